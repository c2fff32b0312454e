"""What a controller and its ranks tell each other."""

from __future__ import annotations

from dataclasses import dataclass

from paceline.serve.executor.base import StepResult, Work


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What the ranks of an engine compute, for as long as they live.

    Attributes:
        model: a MODEL.
        adapter: folder of what is merged into it; empty for none.
        identity: of the weights; a rank that finds others does not begin.
        dtype: of weights, activations, keys and values.
        device: ``cpu`` or ``cuda``.
        pp: stages.
        tp: ranks that share each matrix.
        num_blocks: blocks of keys and values.
        block_size: tokens to a block.
        num_threads: that a rank computes with.
    """

    model: str
    adapter: str
    identity: str
    dtype: str
    device: str
    pp: int
    tp: int
    num_blocks: int
    block_size: int
    num_threads: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Begin:
    """The first message to a rank.

    Attributes:
        job: of all ranks.
        rank: of this one.
        store: file through which the ranks find each other.
    """

    job: Job
    rank: int
    store: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """Something to compute; every rank gets it.

    Attributes:
        number: counts up.
        released: requests whose tables are forgotten before.
        works: parts of requests.
    """

    number: int
    released: tuple[int, ...]
    works: tuple[Work, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Ready:
    """A rank's first message: its part of the model is there, and all ranks have met."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Done:
    """A rank has computed its part of a step.

    Attributes:
        number: of the step.
        num_rows: tokens that went through its blocks.
        begin_s: when it had what it needs, on the machine's monotonic clock.
        end_s: when it was done.
        result: of the step, from the one rank that chooses its tokens.
    """

    number: int
    num_rows: int
    begin_s: float
    end_s: float
    result: StepResult | None = None


TO_RANKS: dict[str, type] = {"begin": Begin, "step": Step}
FROM_RANKS: dict[str, type] = {"ready": Ready, "done": Done}
