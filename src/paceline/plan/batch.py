"""How a step's tokens are cut: over data ranks, then into micro-batches. Pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

from paceline.plan.plan import Plan


@dataclass(frozen=True, slots=True)
class BatchShape:
    """Sizes of one optimizer step, in sequences.

    Attributes:
        num_data_ranks: ranks that read different sequences.
        num_microbatches: micro-batches that each of them accumulates.
        microbatch_sequences: sequences of one micro-batch on one rank.
    """

    num_data_ranks: int
    num_microbatches: int
    microbatch_sequences: int

    @property
    def sequences_per_rank(self) -> int:
        return self.num_microbatches * self.microbatch_sequences

    @property
    def sequences_per_step(self) -> int:
        return self.sequences_per_rank * self.num_data_ranks


def batch_shape(plan: Plan) -> BatchShape:
    """The sizes that a plan implies; `paceline.plan.check` has seen to it that they are whole."""
    num_data_ranks = plan.mesh.num_data_ranks
    sequences = plan.train.tokens_per_step // plan.train.sequence_length // num_data_ranks
    if plan.pipeline.num_microbatches is not None:
        size = sequences // plan.pipeline.num_microbatches
    else:
        limit = max(1, plan.train.microbatch_tokens // plan.train.sequence_length)
        size = max(n for n in range(1, min(limit, sequences) + 1) if sequences % n == 0)
    return BatchShape(num_data_ranks, sequences // size, size)
