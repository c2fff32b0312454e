"""The long proofs: runs what is not done yet, and writes docs/evidence.md."""

from __future__ import annotations

import subprocess
import sys
from datetime import date
from pathlib import Path

import certified
from kills import prove

ROOT = Path(__file__).parent.parent
RECORDS = Path(__file__).parent / "records"
NUM_KILLS = 200


def main() -> None:
    certified.main()
    records = prove(RECORDS / "kills", NUM_KILLS)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    partial = sum(bool(record["partial"]) for record in records)
    (ROOT / "docs" / "evidence.md").write_text(
        f"""# Evidence

Written by `make evidence`, commit {commit}, {date.today()}. CI runs a seeded tenth.

| proof | done | outcome |
|---|---|---|
| a run that saves at every step, killed with SIGKILL and resumed (`evidence/kills.py`) | \
{len(records)} kills, {partial} of them in the middle of a save | every logged loss equals the \
uninterrupted run's, every newest complete checkpoint is whole |
"""
    )
    print(f"{len(records)} kills, {partial} in the middle of a save", file=sys.stderr)


if __name__ == "__main__":
    main()
