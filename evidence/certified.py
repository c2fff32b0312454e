"""Proof: every layout of the matrix and 200 random plans compute what one process does.

Each layout and each plan leaves a record; started again, the proof goes on where it was. The page
docs/certified.md is written from the records.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, ClassVar

from rich.progress import track

from paceline.core.errors import PacelineError
from paceline.core.record import Record, RecordWriter, read_records
from paceline.verify.certify import BOUND, certify
from paceline.verify.fuzz import trial
from paceline.verify.matrix import layouts

ROOT = Path(__file__).parent.parent
NUM_PLANS = 200
SEED = 0
MAX_REFUSED = 0.2


@dataclass(frozen=True, kw_only=True, slots=True)
class LayoutRecord(Record):
    """A layout of the matrix has been compared with the oracle.

    Attributes:
        name: of the layout.
        gradient: the largest relative error of gradients, norm and clip factor.
        weight: of weights after two steps.
        loss: of losses.
        is_certified: whether all are within the bound.
        time_s: that it took.
    """

    kind: ClassVar[str] = "layout"
    name: str
    gradient: float
    weight: float
    loss: float
    is_certified: bool
    time_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanRecord(Record):
    """A random plan has been compared with the oracle, or refused.

    Attributes:
        number: of the draw.
        title: the plan in words.
        outcome: certified, refused or failed.
        error: the largest, of one that is certified.
        why: where that is, or what refuses it, or how it failed.
    """

    kind: ClassVar[str] = "plan"
    number: int
    title: str
    outcome: str
    error: float
    why: str


_PAGE = """# Certified

Written by `make certified`, commit {commit}, {today}. Do not edit.

Each layout trains two steps, once with SGD and momentum on packed documents and once with AdamW on
padded ones, in float64 on forked gloo ranks, and is compared with one process that writes the same
steps out as formulas (`verify/oracle.py`). In play everywhere: ranks with unequal numbers of valid
tokens, a tied embedding, a frozen layer, accumulation, a clip that bites, and rows of 17 tokens.
The error of a gradient is max|a - b| / max(max|b|, 1e-6 G), of each parameter; weights are compared
in norm. Every figure is the largest over ranks, steps and cases; the bound is {bound:.0e}.

| layout | gradients, norm, clip | weights | loss |
|---|---|---|---|
{rows}

## Random plans

`paceline verify --fuzz {count} --seed {seed}`:
{certified} certified, {refused} refused, {failed} failed.

In plans of GPT-2 the biases of keys are frozen: without rotated positions their gradient is zero in
theory, and what is compared would be rounding over the formula's floor (up to 1.1e-12).
{refusals}

Largest error of those certified: {worst}.
"""


def prove(folder: Path, *, names: Iterable[str], num_plans: int) -> list[dict[str, Any]]:
    """Certifies what has no record yet.

    Raises:
        PacelineError: a layout or a plan that failed, or too many refused.
    """
    path = folder / "certified.jsonl"
    done = list(read_records(path)) if path.exists() else []
    known = {record.get("name", record.get("number")) for record in done}
    writer = RecordWriter(path)
    plans = layouts()
    for name in track([n for n in names if n not in known], "layouts"):
        start_s = time.perf_counter()
        found = certify(*plans[name])
        writer.write(
            LayoutRecord(
                name=name,
                gradient=found.max_rel_grad_error,
                weight=found.max_rel_param_error,
                loss=found.loss_error,
                is_certified=found.certified,
                time_s=time.perf_counter() - start_s,
            )
        )
    for number in track([n for n in range(num_plans) if n not in known], "random plans"):
        drawn = trial(SEED, number)
        writer.write(
            PlanRecord(
                number=number,
                title=drawn.title,
                outcome=drawn.outcome,
                error=drawn.error,
                why=drawn.why,
            )
        )
    writer.close()
    records = list(read_records(path))
    _require(records)
    return records


def _require(records: list[dict[str, Any]]) -> None:
    layouts_found = [record for record in records if record["kind"] == "layout"]
    if bad := [record["name"] for record in layouts_found if not record["is_certified"]]:
        raise PacelineError(f"not certified: {bad}")
    drawn = [record for record in records if record["kind"] == "plan"]
    if bad := [f"{r['title']}: {r['why']}" for r in drawn if r["outcome"] == "failed"]:
        raise PacelineError(f"random plans failed: {bad}")
    refused = sum(record["outcome"] == "refused" for record in drawn)
    if refused > MAX_REFUSED * len(drawn):
        raise PacelineError(f"{refused} of {len(drawn)} random plans were refused")


def page(records: list[dict[str, Any]], commit: str) -> str:
    """docs/certified.md."""
    rows = [
        f"| {r['name']} | {r['gradient']:.1e} | {r['weight']:.1e} | {r['loss']:.1e} |"
        for r in records
        if r["kind"] == "layout"
    ]
    drawn = [record for record in records if record["kind"] == "plan"]
    outcomes = Counter(record["outcome"] for record in drawn)
    reasons = Counter(record["why"] for record in drawn if record["outcome"] == "refused")
    worst = max((r for r in drawn if r["outcome"] == "certified"), key=lambda r: r["error"])
    refusals = [f"- {times} refused: {reason}" for reason, times in reasons.most_common()]
    return _PAGE.format(
        commit=commit,
        today=date.today(),
        bound=BOUND,
        rows="\n".join(rows),
        count=len(drawn),
        seed=SEED,
        certified=outcomes["certified"],
        refused=outcomes["refused"],
        failed=outcomes["failed"],
        refusals="".join(f"\n{line}" for line in refusals),
        worst=f"{worst['error']:.1e} ({worst['title']}; {worst['why']})",
    )


def main() -> None:
    records = prove(ROOT / "evidence" / "records", names=layouts(), num_plans=NUM_PLANS)
    command = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    (ROOT / "docs" / "certified.md").write_text(page(records, commit.strip()))
    print(f"{len(records)} records, docs/certified.md written", file=sys.stderr)


if __name__ == "__main__":
    main()
