"""Train a tiny model on a text of a few lines, and use what came out.

python examples/train_tiny.py
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import paceline as pl

TEXT = "A paceline is a line of riders who take turns at the front.\n"
PLAN = pl.Plan(
    train=pl.TrainConfig(sequence_length=64, tokens_per_step=512),
    optimizer=pl.OptimizerConfig(lr=3e-3, schedule=pl.ScheduleConfig(warmup_steps=5)),
)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "text.txt").write_text(TEXT * 60)
        trainer = pl.Trainer(
            "random:llama:tiny",
            data=folder / "text.txt",
            plan=PLAN,
            out=folder / "run",
            steps=150,
        )
        last = trainer.run()
        assert last is not None
        print(f"after {last.step} steps of {last.tokens} tokens the loss is {last.loss:.3f}")
        assert last.loss < 0.2, "a model that knows nothing has a loss of log 259 = 5.6"

        export = [sys.executable, "-m", "paceline", "checkpoint", "export", str(trainer.folder)]
        subprocess.run([*export, "-o", str(folder / "model")], check=True, capture_output=True)
        answer = pl.Engine(folder / "model").generate("A paceline is a line", max_tokens=10)[0]
        print(f"'A paceline is a line' goes on with {answer.text!r}")
        assert answer.text in TEXT, "it has learnt its text by heart"


if __name__ == "__main__":
    main()
