"""Resume a run from a checkpoint, and see that the steps after it are the same to the last bit.

python examples/resume.py
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import paceline as pl

STEPS, INTERVAL = 12, 4
PLAN = pl.Plan(
    train=pl.TrainConfig(sequence_length=32, tokens_per_step=256),
    checkpoint=pl.CheckpointConfig(interval_steps=INTERVAL),
)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "text.txt").write_text("Riders take turns at the front of the line.\n" * 50)
        run = folder / "run"
        data = folder / "text.txt"
        pl.Trainer("random:llama:tiny", data=data, plan=PLAN, out=run, steps=STEPS).run()
        uninterrupted = losses(run)

        # As if it had been killed after step 7: only what was saved at step 4 is there.
        for step in (2 * INTERVAL, STEPS):
            shutil.rmtree(run / "checkpoints" / f"step-{step}")
        last = pl.Trainer.resume(run).run()

        resumed = losses(run)
        assert last is not None
        assert last.step == STEPS
        assert resumed == uninterrupted, "a resumed run gives the losses of one that goes through"
        print(f"steps {INTERVAL + 1} to {STEPS} ran twice and gave the same losses both times")


def losses(run: Path) -> dict[int, float]:
    """The loss of each step as it was last logged."""
    lines = (run / "records" / "rank-0.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return {record["step"]: record["loss"] for record in records if record["kind"] == "step"}


if __name__ == "__main__":
    main()
