from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.plan.batch import BatchShape, batch_shape
from paceline.plan.mesh import MeshConfig
from paceline.plan.plan import PipelineConfig, Plan, TrainConfig


def plan_of(
    *,
    sequence_length: int,
    sequences: int,
    microbatch_tokens: int = 2048,
    num_microbatches: int | None = None,
    **degrees: int,
) -> Plan:
    """A plan whose data ranks read `sequences` sequences a step, each."""
    mesh = MeshConfig(**degrees)
    train = TrainConfig(
        sequence_length=sequence_length,
        tokens_per_step=sequences * sequence_length * mesh.dp_replicate * mesh.dp_shard,
        microbatch_tokens=microbatch_tokens,
    )
    return Plan(mesh=mesh, train=train, pipeline=PipelineConfig(num_microbatches=num_microbatches))


@pytest.mark.parametrize(
    ("plan", "shape"),
    [
        (Plan(), BatchShape(1, 2, 4)),  # 4096 tokens of 512, at most 2048 at a time
        (plan_of(sequence_length=512, sequences=6, dp_shard=2), BatchShape(2, 2, 3)),
        (plan_of(sequence_length=512, sequences=7), BatchShape(1, 7, 1)),  # 7 is prime
        (plan_of(sequence_length=4096, sequences=3), BatchShape(1, 3, 1)),  # longer than the bound
        (plan_of(sequence_length=16, sequences=3), BatchShape(1, 1, 3)),
        (plan_of(sequence_length=512, sequences=8, num_microbatches=1), BatchShape(1, 1, 8)),
        (plan_of(sequence_length=512, sequences=8, dp_replicate=3, pp=2), BatchShape(3, 2, 4)),
    ],
)
def test_batch_shapes_by_hand(plan, shape):
    assert batch_shape(plan) == shape


@settings(deadline=None, max_examples=100)
@given(
    sequence_length=st.integers(1, 300),
    sequences=st.integers(1, 60),
    microbatch_tokens=st.integers(1, 5000),
    dp_replicate=st.integers(1, 3),
    dp_shard=st.integers(1, 3),
    tp=st.integers(1, 3),
)
def test_a_step_is_cut_into_as_few_whole_microbatches_as_fit(
    sequence_length, sequences, microbatch_tokens, **degrees
):
    plan = plan_of(
        sequence_length=sequence_length,
        sequences=sequences,
        microbatch_tokens=microbatch_tokens,
        **degrees,
    )
    shape = batch_shape(plan)
    assert shape.num_data_ranks == degrees["dp_replicate"] * degrees["dp_shard"]
    assert shape.sequences_per_rank == sequences
    assert shape.sequences_per_step * sequence_length == plan.train.tokens_per_step
    size = shape.microbatch_sequences
    assert size == 1 or size * sequence_length <= microbatch_tokens
    larger = [n for n in range(size + 1, sequences + 1) if sequences % n == 0]
    assert all(n * sequence_length > microbatch_tokens for n in larger)


@settings(deadline=None, max_examples=50)
@given(
    num_microbatches=st.integers(1, 20),
    size=st.integers(1, 60),  # beyond what the default microbatch_tokens admits, too
    dp_shard=st.integers(1, 3),
)
def test_a_given_number_of_microbatches_is_kept(num_microbatches, size, dp_shard):
    plan = plan_of(
        sequence_length=64,
        sequences=num_microbatches * size,
        num_microbatches=num_microbatches,
        dp_shard=dp_shard,
    )
    assert batch_shape(plan) == BatchShape(dp_shard, num_microbatches, size)
