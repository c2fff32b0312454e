"""A mixture of experts on two ranks learns what it learns in one process, under bfloat16 compute.

Trains ``random:mixtral:tiny`` for 200 steps three times: in one process with two orders of data,
whose difference is the noise, and with ``mesh.ep = 2`` in the first of them. Prints the mean loss
of the last steps of each, and the load of experts before and after. Takes about three minutes.

    python evidence/experts.py
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

from paceline.core.record import read_records

NUM_STEPS, LAST = 200, 20
SETTINGS = (
    "precision.compute=bfloat16",
    "expert.balance_loss_weight=0.01",
    "train.sequence_length=128",
    "train.tokens_per_step=1024",
    "optimizer.lr=0.003",
    f"checkpoint.interval_steps={NUM_STEPS}",
)
RUNS = {
    "one process, seed 0": ("train.seed=0",),
    "one process, seed 1": ("train.seed=1",),
    "ep 2, seed 0": ("train.seed=0", "mesh.dp_shard=2", "mesh.ep=2"),
}


def train(folder: Path, settings: tuple[str, ...]) -> list[dict[str, Any]]:
    """The records of the steps of a run."""
    flags = [word for setting in (*SETTINGS, *settings) for word in ("--set", setting)]
    command = [sys.executable, "-m", "paceline", "train", "random:mixtral:tiny"]
    command += ["--data", "builtin:python-stdlib", "--steps", str(NUM_STEPS), "--out", str(folder)]
    subprocess.run([*command, *flags], check=True, capture_output=True)
    return list(read_records(folder / "records" / "rank-0.jsonl", "step"))


def main() -> None:
    losses: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as root:
        for name, settings in RUNS.items():
            steps = train(Path(root) / name.replace(" ", "-"), settings)
            assert len(steps) == NUM_STEPS
            losses[name] = mean(step["loss"] for step in steps[-LAST:])
            first, last = steps[0], steps[-1]
            print(
                f"{name}: loss {first['loss']:.3f} to {losses[name]:.4f}, "
                f"expert load {first['expert_load']:.2f} to {last['expert_load']:.2f}, "
                f"balance loss {first['balance_loss']:.3f} to {last['balance_loss']:.3f}, "
                f"{sum(step['time_s'] for step in steps):.0f} s",
                flush=True,
            )
    one, other, shared_out = losses.values()
    print(f"noise {abs(one - other):.4f}, ep 2 against one process {abs(one - shared_out):.4f}")
    sys.exit(abs(one - shared_out) > abs(one - other))


if __name__ == "__main__":
    main()
