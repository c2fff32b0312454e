"""The page shows what the records say, and needs nothing else."""

from __future__ import annotations

import json
import re
import sys
import xml.etree.ElementTree as ElementTree

import pytest
from test_read import evaluation, save, start, step, write_run

from paceline.cli.main import main
from paceline.plan.plan import Plan
from paceline.report.chart import Line, Marks, chart, thinned, ticks
from paceline.report.page import page, short
from paceline.report.read import read_run


@pytest.fixture
def run_folder(tmp_path):
    records = [
        *(start(1), evaluation(0, 9.0)),
        *(step(n, 10.0 / n) for n in range(1, 7)),
        *(save(4), start(5, device="another <device>")),
        *(step(n, 20.0 / n) for n in range(5, 9)),
        *(save(8), evaluation(8, 2.75)),
    ]
    plan = Plan.from_dict({"mesh": {"dp_shard": 2}})
    return write_run(tmp_path / "run", records, [start(1), step(1, 1.0)], plan=plan)


def test_the_page_holds_the_run(run_folder):
    text = page(read_run(run_folder))
    for part in (
        "m&lt;1&gt;",
        "trained on text &amp; more.txt: at step 8 of 9",
        "<b>2.5000</b><span>loss of the last step",
        "<b>2.7500</b><span>held-out loss",
        "<b>8 of 9</b>",
        'class="changed"><td><code>mesh.dp_shard</code></td><td><code>2</code>',
        "<td><code>train.sequence_length</code></td><td><code>512</code>",
        "another &lt;device&gt;",
        "saved after step 4",
        "resumed at step 5",
        "Memory of rank",
    ):
        assert part in text, part
    assert len(re.findall("<svg", text)) == 8


def test_it_needs_nothing_else(run_folder):
    text = page(read_run(run_folder))
    assert "<script" not in text
    assert not re.findall(r"""(?:src|href)\s*=|url\(|@import|https?://""", text)
    assert "prefers-color-scheme: dark" in text


def test_it_is_well_formed(run_folder):
    text = page(read_run(run_folder))
    body = text[text.index("<body>") : text.index("</html>")]
    assert ElementTree.fromstring(body).tag == "body"


def points_of(drawn, number=0):
    svg = ElementTree.fromstring(drawn[drawn.index("<svg") : drawn.index("</figure>")])
    line = next(e for e in svg.iter("polyline") if e.get("class") == f"line{number}")
    return [tuple(map(float, pair.split(","))) for pair in line.get("points", "").split()]


def test_a_chart_puts_values_where_they_belong():
    values = [(1, 10.0), (2, 30.0), (3, float("nan")), (5, 20.0)]
    (x1, y1), (x2, y2), (x3, y3) = points_of(chart("A <b>", [Line("", values)], marks=Marks()))
    assert x3 - x2 == pytest.approx(3 * (x2 - x1), abs=0.2)
    assert y1 - y2 == pytest.approx(2 * (y3 - y2), abs=0.2)  # 0 is at the top of the picture
    assert "A &lt;b&gt;" in chart("A <b>", [Line("", values)], marks=Marks())


def test_a_limit_is_drawn_where_it_is_in_sight():
    line = Line("", [(1, 2.0), (2, 3.0)])
    assert 'class="limit"' in chart("t", [line], marks=Marks(), limit=1.0)
    assert 'class="limit"' not in chart("t", [line], marks=Marks(), limit=100.0)
    assert 'class="limit"' not in chart("t", [line], marks=Marks(), limit=0.0)


@pytest.mark.parametrize("values", [[(3, 1.0)], [(1, 0.0), (2, 0.0)], [(1, -5.0), (9, -5.0)]])
def test_values_that_do_not_vary(values):
    assert len(points_of(chart("t", [Line("", values)], marks=Marks()))) == len(values)
    assert len(points_of(chart("t", [Line("", values)], marks=Marks(), is_from_zero=True)))


def test_nothing_finite_is_no_chart():
    assert chart("t", [Line("", [(1, float("inf"))])], marks=Marks()) == ""
    assert chart("t", [], marks=Marks()) == ""


def test_ticks_are_round_and_few():
    assert ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert ticks(0.13, 0.48) == pytest.approx([0.2, 0.3, 0.4])
    assert ticks(1, 1999) == [500, 1000, 1500]
    for low, high in ((0, 7e-5), (-3.2, 1e6), (5, 6)):
        assert 2 <= len(ticks(low, high)) <= 6


def test_many_points_are_thinned_and_spikes_stay():
    points = [(n, 1.0) for n in range(10_000)]
    points[7777] = (7777, 99.0)
    few = thinned(points)
    assert len(few) <= 801  # the last one too
    assert (few[0], few[-1]) == (points[0], points[-1])
    assert (7777, 99.0) in few
    assert few == sorted(few)
    assert thinned(points[:800]) == points[:800]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.1234, "0.123"), (999.4, "999"), (65536, "65.5 k"), (2e9, "2 G")],
)
def test_short_numbers(value, text):
    assert short(value) == text


def command(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["paceline", "report", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        main()
    return caught.value.code, *capsys.readouterr()


def test_the_command(monkeypatch, capsys, run_folder, tmp_path):
    out = tmp_path / "deep" / "report.html"
    assert command(monkeypatch, capsys, run_folder, "-o", out) == (0, f"{out}\n", "")
    assert out.read_text() == page(read_run(run_folder))
    code, text, _ = command(monkeypatch, capsys, run_folder, "-o", out, "--json")
    assert code == 0
    assert json.loads(text) == {"path": str(out), **read_run(run_folder).summary()}


def test_the_command_on_what_is_no_run(monkeypatch, capsys, tmp_path):
    code, _, errors = command(monkeypatch, capsys, tmp_path, "-o", tmp_path / "report.html")
    assert code == 2
    assert "is not a run folder" in errors
    assert not (tmp_path / "report.html").exists()


@pytest.mark.cpu
def test_event_files(monkeypatch, capsys, run_folder, tmp_path):
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    events = tmp_path / "events"
    arguments = (run_folder, "-o", tmp_path / "report.html", "--tensorboard", events)
    assert command(monkeypatch, capsys, *arguments)[0] == 0
    found = event_accumulator.EventAccumulator(str(events)).Reload()
    losses = [(event.step, event.value) for event in found.Scalars("train/loss")]
    steps = read_run(run_folder).first.steps
    assert losses == [(s["step"], pytest.approx(s["loss"])) for s in steps]
    assert [event.value for event in found.Scalars("eval/loss")] == [9.0, 2.75]


@pytest.mark.cpu
def test_event_files_need_their_extra(monkeypatch, capsys, run_folder, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    out = tmp_path / "report.html"
    code, _, errors = command(monkeypatch, capsys, run_folder, "-o", out, "--tensorboard", tmp_path)
    assert code == 2
    assert "hint: pip install 'paceline[report]'" in errors
    assert not out.exists()
