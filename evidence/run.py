"""The long proofs: runs what is not done yet, and writes docs/evidence.md."""

from __future__ import annotations

import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import certified
import faults
import ladder_retrained
import recovery
from kills import prove

ROOT = Path(__file__).parent.parent
RECORDS = Path(__file__).parent / "records"
NUM_KILLS, NUM_KILLS_OF_RANKS = 180, 20
NUM_RECOVERIES = 10


def _losses(record: dict[str, Any]) -> str:
    """Before, converted and trained again, in words."""
    plain, converted, retrained = (
        f"{record[f'{name}_loss']:.3f}" for name in ("plain", "converted", "retrained")
    )
    text = f"loss on {record['text']} text {plain}, converted {converted}, then {retrained}"
    return f"{text}: {record['regained']:.0%} came back"


def main() -> None:
    certified.main()
    records = prove(RECORDS / "lazy_kills", NUM_KILLS)
    records += prove(RECORDS / "lazy_kills_of_ranks", NUM_KILLS_OF_RANKS, ranks=2)
    recovered = recovery.prove(RECORDS / "recovery", NUM_RECOVERIES)
    found = faults.prove(RECORDS / "faults.jsonl")
    held_out, prose = ladder_retrained.prove(RECORDS / "ladder")
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    partial = sum(bool(record["partial"]) for record in records)
    lost = max(int(str(record["lost_steps"])) for record in records)
    (ROOT / "docs" / "evidence.md").write_text(
        f"""# Evidence

Written by `make evidence`, commit {commit}, {date.today()}. CI runs a seeded tenth.

| proof | done | outcome |
|---|---|---|
| a run that saves lazily at every step, killed with SIGKILL and resumed (`evidence/kills.py`) | \
{len(records)} kills, {NUM_KILLS_OF_RANKS} of runs of two ranks, {partial} in the middle of a save \
| every logged loss equals the uninterrupted run's, every newest complete checkpoint is whole, at \
most {lost} logged steps had to be taken again |
| supervised runs on four ranks, of which a random one is killed or stopped \
(`evidence/recovery.py`) | {len(recovered)} faults on {len(recovery.LAYOUTS)} layouts | \
{recovery.summary(recovered)} (least / median / most), every logged loss equals one rank's |
| a rank that dies, stops or sleeps, or a link that slows down, of four watched ranks \
(`evidence/faults.py`) | {len(found)} trials | {faults.summary(found)} |
| SmolLM2's upper half converted to a ladder residual and trained again \
(`evidence/ladder_retrained.py`) | {held_out["steps"]} steps, {held_out["tokens"]:,} tokens, \
{held_out["core_s"]:,.0f} s of a core | {_losses(held_out)}; {_losses(prose)} |
"""
    )
    print(f"{len(records)} kills, {partial} in the middle of a save", file=sys.stderr)


if __name__ == "__main__":
    main()
