"""What it costs in quality that a token chooses equally many experts in each group (MoGE).

Trains the sizes of ``random:mixtral:tiny`` for 200 steps with its eight experts free and in two
groups, of each of which a token chooses one, from the same weights, with two orders of data. Prints
the mean loss of the last steps of each. Takes about two minutes.

    python evidence/grouped.py
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import mean

from paceline.core.record import read_records
from paceline.models.hub import resolve
from paceline.plan.plan import Plan
from paceline.train.job import new_job, run_job
from paceline.train.run import RunConfig, RunFolder

MODEL = "random:mixtral:tiny"
NUM_STEPS, LAST = 200, 20
SETTINGS = (
    "expert.balance_loss_weight=0.01",
    "train.sequence_length=128",
    "train.tokens_per_step=1024",
    "optimizer.lr=0.003",
    f"checkpoint.interval_steps={NUM_STEPS}",
)


def final_loss(folder: Path, num_groups: int, seed: int) -> float:
    """The mean loss of the last steps."""
    source = resolve(MODEL)
    assert source.spec.moe is not None
    spec = replace(source.spec, moe=replace(source.spec.moe, num_groups=num_groups))
    plan = Plan().with_overrides([*SETTINGS, f"train.seed={seed}"])
    config = RunConfig(model=MODEL, data="builtin:python-stdlib", steps=NUM_STEPS)
    run_job(new_job(config, plan, RunFolder(folder)), replace(source, spec=spec), "cpu")
    steps = read_records(folder / "records" / "rank-0.jsonl", "step")
    return mean([step["loss"] for step in steps][-LAST:])


def main() -> None:
    with tempfile.TemporaryDirectory() as root:
        for seed in (0, 1):
            plain, grouped = (
                final_loss(Path(root) / f"{groups}-{seed}", groups, seed) for groups in (1, 2)
            )
            print(f"seed {seed}: experts free {plain:.4f}, in two groups {grouped:.4f}", flush=True)


if __name__ == "__main__":
    main()
