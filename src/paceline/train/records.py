"""What a training run writes down."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from paceline.core.record import Record


@dataclass(frozen=True, kw_only=True, slots=True)
class RunRecord(Record):
    """A run, or its resumption, begins.

    Attributes:
        model: as the user named it.
        first_step: the step to be taken next.
        num_steps: the run's last step.
        num_ranks: ranks in the world.
        device: this rank's device, in words.
        peak_flops: FLOP/s of matrix products measured on this rank.
        paceline: version of this package.
        torch: version of torch.
    """

    kind: ClassVar[str] = "run"
    model: str
    first_step: int
    num_steps: int
    num_ranks: int
    device: str
    peak_flops: float
    paceline: str
    torch: str


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRecord(Record):
    """A step is done.

    Attributes:
        step: from 1.
        loss: mean over the step's valid tokens.
        grad_norm: before the clip.
        clip_factor: what the gradient was multiplied by.
        learning_rate: of this step.
        tokens: of this step, over all ranks.
        valid_tokens: those with a loss.
        tokens_per_s: over all ranks.
        time_s: of this step.
        peak_share: this rank's model FLOP/s over its measured peak (MFU).
        memory_bytes: the most this rank has held.
        statistics: what the model's modules have counted in the step, by name; the same on every
            rank. In the file each of them is a key beside the others.
    """

    kind: ClassVar[str] = "step"
    step: int
    loss: float
    grad_norm: float
    clip_factor: float
    learning_rate: float
    tokens: int
    valid_tokens: int
    tokens_per_s: float
    time_s: float
    peak_share: float
    memory_bytes: int
    statistics: Mapping[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        values = Record.to_dict(self)
        return values | values.pop("statistics")


@dataclass(frozen=True, kw_only=True, slots=True)
class FinalRecord(StepRecord):
    """The last step of a run with held-out data.

    Attributes:
        eval_loss: mean over the held-out tokens, after the step.
        eval_perplexity: its exponential.
    """

    eval_loss: float
    eval_perplexity: float


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalRecord(Record):
    """The held-out data has been read.

    Attributes:
        step: steps taken before it; 0 is the model as it was.
        loss: mean over the tokens.
        perplexity: its exponential.
        tokens: that had a loss, over all ranks.
        time_s: that training stood still.
    """

    kind: ClassVar[str] = "eval"
    step: int
    loss: float
    perplexity: float
    tokens: int
    time_s: float
