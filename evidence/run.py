"""The long proofs: runs what is not done yet of those that are named, and tells docs/evidence.md.

``python evidence/run.py [NAME ...]``: of those below, or all. A proof that is not run keeps its
line on the page, with the commit that it was run on.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import certified
import disconnects
import faults
import kills
import ladder_retrained
import recovery
import soak

from paceline.core.errors import PacelineError, UnknownNameError

ROOT = Path(__file__).parent.parent
RECORDS = Path(__file__).parent / "records"
PAGE = ROOT / "docs" / "evidence.md"
NUM_KILLS, NUM_KILLS_OF_RANKS = 180, 20
NUM_RECOVERIES = 10
NUM_DISCONNECTS = 10_000
SOAK_S = 600.0
_HEAD = """# Evidence

Written by `make evidence`, which runs what its records lack and updates these lines: each names the
commit and the day of its run. CI runs a seeded tenth of each proof.

| proof | done | outcome | commit |
|---|---|---|---|
"""


class Told(NamedTuple):
    """What a proof has come to, in words.

    Attributes:
        claim: that it is a proof of.
        done: how much of it.
        outcome: of that.
    """

    claim: str
    done: str
    outcome: str


def _certified() -> Told:
    certified.main()
    claim = "layouts and random plans compute what one process does"
    return Told(claim, "[its page](certified.md)", "no gradient is further off than the bound")


def _kills() -> Told:
    records = kills.prove(RECORDS / "lazy_kills", NUM_KILLS)
    records += kills.prove(RECORDS / "lazy_kills_of_ranks", NUM_KILLS_OF_RANKS, ranks=2)
    partial = sum(bool(record["partial"]) for record in records)
    lost = max(int(str(record["lost_steps"])) for record in records)
    return Told(
        "a run that saves lazily at every step, killed with SIGKILL and resumed",
        f"{len(records)} kills, {NUM_KILLS_OF_RANKS} of runs of two ranks, {partial} in the middle "
        "of a save",
        "every logged loss equals the uninterrupted run's, every newest complete checkpoint is "
        f"whole, at most {lost} logged steps had to be taken again",
    )


def _recovery() -> Told:
    records = recovery.prove(RECORDS / "recovery", NUM_RECOVERIES)
    return Told(
        "supervised runs on four ranks, of which a random one is killed or stopped",
        f"{len(records)} faults on {len(recovery.LAYOUTS)} layouts",
        f"{recovery.summary(records)} (least / median / most), every logged loss equals one rank's",
    )


def _faults() -> Told:
    records = faults.prove(RECORDS / "faults.jsonl")
    return Told(
        "a rank that dies, stops or sleeps, or a link that slows down, of four watched ranks",
        f"{len(records)} trials",
        faults.summary(records),
    )


def _ladder_retrained() -> Told:
    held_out, prose = ladder_retrained.prove(RECORDS / "ladder")
    return Told(
        "SmolLM2's upper half converted to a ladder residual and trained again",
        f"{held_out['steps']} steps, {held_out['tokens']:,} tokens, {held_out['core_s']:,.0f} s of "
        "a core",
        f"{_losses(held_out)}; {_losses(prose)}",
    )


def _disconnects() -> Told:
    records = disconnects.prove(RECORDS / "disconnects", NUM_DISCONNECTS)
    return Told(
        "requests over HTTP whose clients leave at random moments",
        f"{len(records) * disconnects.BATCH:,} requests",
        f"{disconnects.summary(records)}; after each batch every block is free or cached, and who "
        "stays is answered as before",
    )


def _soak() -> Told:
    records = soak.prove(RECORDS / "soak", SOAK_S)
    return Told(
        "a server at saturation: memory, latency and what the metrics count",
        f"{SOAK_S:,.0f} s, {soak.CLIENTS} clients",
        soak.summary(records),
    )


def _losses(record: dict[str, Any]) -> str:
    """Before, converted and trained again, in words."""
    plain, converted, retrained = (
        f"{record[f'{name}_loss']:.3f}" for name in ("plain", "converted", "retrained")
    )
    text = f"loss on {record['text']} text {plain}, converted {converted}, then {retrained}"
    return f"{text}: {record['regained']:.0%} came back"


PROOFS: dict[str, Callable[[], Told]] = {
    "certified": _certified,
    "kills": _kills,
    "recovery": _recovery,
    "faults": _faults,
    "ladder_retrained": _ladder_retrained,
    "disconnects": _disconnects,
    "soak": _soak,
}


def main(names: list[str]) -> None:
    if unknown := [name for name in names if name not in PROOFS]:
        raise UnknownNameError("proof", unknown[0], list(PROOFS))
    for name in names or PROOFS:
        _write(name, PROOFS[name]())


def _write(name: str, told: Told) -> None:
    """Replaces the page's line of a proof."""
    text = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    lines = {proof: _line_of(proof, text) for proof in PROOFS}
    outcome = f"{told.claim} | {told.done} | {told.outcome}"
    lines[name] = f"{_begin(name)}: {outcome} | {_commit()}, {date.today()} |\n"
    PAGE.write_text(_HEAD + "".join(lines.values()))


def _line_of(proof: str, text: str) -> str:
    found = (line for line in text.splitlines(keepends=True) if line.startswith(_begin(proof)))
    return next(found, "")


def _begin(proof: str) -> str:
    return f"| `evidence/{proof}.py`"


def _commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return found.stdout.strip()


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except PacelineError as error:
        sys.exit(str(error))
