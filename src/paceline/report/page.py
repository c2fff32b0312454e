"""A run as one HTML page that needs nothing else: no script, no font, no network."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from html import escape
from pathlib import Path

import paceline
from paceline.report.chart import Line, Marks, Point, chart
from paceline.report.read import Run, Values

_GIB = 2**30
_MAX_RANKS = 16


def page(run: Run) -> str:
    """The page."""
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    title = f"{run.config.get('model', '')} in {run.path.name}"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>
{style}</style>
</head>
<body>
<h1>{escape(str(run.config.get("model", "")))}</h1>
<p class="lead">{escape(_lead(run))}</p>
<div class="cards">{"".join(_cards(run))}</div>
<h2>Steps</h2>
<div class="charts">
{_charts(run)}
</div>
{_legend(run)}
<h2>Ranks</h2>
<div class="box">{_ranks(run)}</div>
<h2>Plan</h2>
{_plan(run)}
<h2>Machine</h2>
<div class="box">{_machine(run)}</div>
<footer>{escape(str(run.path))}, reported by paceline {paceline.__version__}</footer>
</body>
</html>
"""


def _lead(run: Run) -> str:
    data = run.config.get("data", "")
    data = ", ".join(map(str, data)) if isinstance(data, list) else str(data)
    done = run.first.steps[-1]["step"]
    is_done = done >= run.num_steps
    state = f"all {done:,} steps taken" if is_done else f"at step {done:,} of {run.num_steps:,}"
    return f"trained on {data}: {state}"


def _cards(run: Run) -> Iterable[str]:
    figures = run.summary()
    cards = {"loss of the last step": f"{figures['loss']:.4f}"}
    if figures["eval_loss"] is not None:
        cards["held-out loss"] = f"{figures['eval_loss']:.4f}"
        cards["held-out perplexity"] = f"{figures['perplexity']:,.2f}"
    cards |= {
        "steps": f"{figures['steps']:,} of {figures['num_steps']:,}",
        "tokens": short(figures["tokens"]),
        "tokens/s, median": short(figures["tokens_per_s"]),
        "of the measured peak": f"{figures['peak_share']:.0%}",
        "in steps": str(timedelta(seconds=round(figures["time_s"]))),
        f"most memory, rank {figures['worst_rank']}": f"{figures['memory_bytes'] / _GIB:.2f} GiB",
        "saves": f"{figures['saves']}",
        "resumptions": f"{figures['resumptions']}",
    }
    for name, figure in cards.items():
        yield f'<div class="card"><b>{escape(figure)}</b><span>{escape(name)}</span></div>'


def _charts(run: Run) -> str:
    marks = Marks([save["step"] for save in run.first.saves], run.resumed_at)
    steps, evaluations = run.first.steps, run.first.evaluations
    clip = run.plan.get("optimizer.clip_norm")
    loss = [Line("training" if evaluations else "", _points(steps, "loss"))]
    if evaluations:
        loss.append(Line("held-out", _points(evaluations, "loss"), has_dots=True))
    perplexity = [Line("", _points(evaluations, "perplexity"), has_dots=True)]
    memory = [(step, size / _GIB) for step, size in _points(run.worst.steps, "memory_bytes")]

    def of_steps(title: str, key: str, write: Callable[[float], str]) -> str:
        line = Line("", _points(steps, key))
        return chart(title, [line], marks=marks, write=write, is_from_zero=True)

    drawn = [
        chart("Loss", loss, marks=marks),
        chart("Held-out perplexity", perplexity, marks=marks, write=short),
        chart("Gradient norm", [Line("", _points(steps, "grad_norm"))], marks=marks, limit=clip),
        of_steps("Learning rate", "learning_rate", "{:.2g}".format),
        of_steps("Tokens per second", "tokens_per_s", short),
        of_steps("Share of the measured peak", "peak_share", "{:.0%}".format),
        of_steps("Seconds a step", "time_s", short),
        chart(
            f"Memory of rank {run.worst.rank}, GiB",
            [Line("", memory)],
            marks=marks,
            write=short,
            is_from_zero=True,
        ),
    ]
    return "\n".join(filter(None, drawn))


def _points(records: Sequence[Values], key: str) -> list[Point]:
    return [(record["step"], record[key]) for record in records if key in record]


def _legend(run: Run) -> str:
    keys = [("save", "saved")] if run.first.saves else []
    keys += [("resumed", "resumed")] if run.resumed_at else []
    keys += (
        [("limit", "bound on the gradient's norm")] if run.plan.get("optimizer.clip_norm") else []
    )
    shown = "".join(f'<span class="key {kind}">{name}</span>' for kind, name in keys)
    return f'<div class="legend">{shown}</div>'


def _ranks(run: Run) -> str:
    """The ranks that held the most, most first, and how fast each was."""
    ranks = sorted(run.ranks, key=lambda log: -log.memory_bytes)
    rows = [
        (
            str(log.rank),
            str(log.starts[-1]["device"]) if log.starts else "",
            f"{log.memory_bytes / _GIB:.2f} GiB",
            f"{log.median('time_s'):.3g} s",
            f"{log.median('peak_share'):.0%}",
        )
        for log in ranks[:_MAX_RANKS]
    ]
    table = _table(
        ("rank", "device", "most memory", "step, median", "of its peak"), rows, numbers=3
    )
    left_out = len(ranks) - _MAX_RANKS
    return table + (f"<p>and {left_out} ranks with less memory</p>" if left_out > 0 else "")


def _plan(run: Run) -> str:
    changed = [key for key in run.plan if key in run.changed]
    rest = [key for key in run.plan if key not in run.changed]
    rows = _plan_rows(run, changed) or '<tr><td colspan="2">the defaults</td></tr>'
    return (
        f'<div class="box"><table>{rows}</table></div>'
        f"<details><summary>{len(rest)} keys at their defaults</summary>"
        f'<div class="box"><table>{_plan_rows(run, rest)}</table></div></details>'
    )


def _plan_rows(run: Run, keys: Sequence[str]) -> str:
    rows: list[str] = []
    for key in keys:
        kind = ' class="changed"' if key in run.changed else ""
        value = json.dumps(run.plan[key], default=str)
        cells = "".join(f"<td><code>{escape(text)}</code></td>" for text in (key, value))
        rows.append(f"<tr{kind}>{cells}</tr>")
    return "".join(rows)


def _machine(run: Run) -> str:
    rows = [
        (
            "resumed" if number else "started",
            f"{start['first_step']:,}",
            f"{start['num_ranks']:,}",
            str(start["device"]),
            f"{start['peak_flops'] / 1e9:,.0f} GFLOP/s",
            str(start["paceline"]),
            str(start["torch"]),
        )
        for number, start in enumerate(run.first.starts)
    ]
    names = ("", "at step", "ranks", "device of rank 0", "measured peak", "paceline", "torch")
    return _table(names, rows, numbers=0)


def _table(names: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: int) -> str:
    """A table whose last `numbers` columns are numbers."""

    def cells(tag: str, texts: Sequence[str]) -> str:
        kinds = [""] * (len(texts) - numbers) + [' class="number"'] * numbers
        pairs = zip(kinds, texts, strict=True)
        return "".join(f"<{tag}{kind}>{escape(text)}</{tag}>" for kind, text in pairs)

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f"<table><tr>{cells('th', names)}</tr>{body}</table>"


def short(value: float) -> str:
    """A number in three digits."""
    for size, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"
