"""A run as event files that TensorBoard reads."""

from __future__ import annotations

from pathlib import Path

from paceline.core.errors import MissingExtraError
from paceline.report.read import Run

_STEP_KEYS = (
    "loss",
    "grad_norm",
    "learning_rate",
    "tokens_per_s",
    "time_s",
    "peak_share",
    "memory_bytes",
)


def write_events(run: Run, folder: Path) -> None:
    """Writes every step's and every evaluation's values; of steps logged twice, what counts.

    Raises:
        MissingExtraError: tensorboard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingExtraError("tensorboard", "report") from error
    with SummaryWriter(log_dir=str(folder)) as writer:
        for step in run.first.steps:
            for key in _STEP_KEYS:
                writer.add_scalar(f"train/{key}", step[key], step["step"])
        for evaluation in run.first.evaluations:
            for key in ("loss", "perplexity"):
                writer.add_scalar(f"eval/{key}", evaluation[key], evaluation["step"])
