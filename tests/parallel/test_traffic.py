"""What a step's ranks send each other, in bytes, is what the docstrings' formulas say, exactly."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from paceline.data.batch import IGNORED, Batch
from paceline.dist.testing import run_ranks
from paceline.dist.world import World
from paceline.models.families.llama import PRESETS
from paceline.models.families.mixtral import PRESETS as MIXTRAL
from paceline.models.weights import RandomWeights, build
from paceline.parallel.apply import apply
from paceline.parallel.pipeline import SCHEDULES
from paceline.parallel.pipeline.passes import TIED
from paceline.parallel.pipeline.runtime import PURPOSES
from paceline.parallel.tensor.boundary import PURPOSE
from paceline.parallel.tensor.decoder import GRADIENTS
from paceline.plan.mesh import MeshConfig
from paceline.plan.model_spec import ModelSpec
from paceline.plan.plan import (
    MemoryConfig,
    PipelineConfig,
    Plan,
    PrecisionConfig,
    TensorConfig,
    ZeroConfig,
)
from paceline.plan.tensor_rules import decoder_rules, even_share
from paceline.train.objective.next_token import next_token

pytestmark = [pytest.mark.cpu, pytest.mark.ranks]

Traffic = Counter[tuple[str, tuple[str, ...], str]]
"""Bytes of each operation, axes and purpose."""

CPU = torch.device("cpu")
B, T = 2, 5
VALID = (10, 3, 0)
"""Labels of the three micro-batches."""
M = len(VALID)
HIDDEN, WIDE, PARAMETER = 8, 8, 8
"""Bytes of a hidden state's number, of the softmax's and of a parameter's, all float64."""
SPEC = replace(
    PRESETS["tiny"],
    vocab_size=43,
    d_model=24,
    num_layers=4,
    num_heads=6,
    num_kv_heads=3,
    head_dim=4,
    d_ffn=37,
    qkv_bias=True,
    output_bias=True,
    ffn_bias=True,
)
MOE = replace(MIXTRAL["tiny"], num_layers=2)


def batches() -> list[Batch]:
    """Three micro-batches, the last without a label."""
    found: list[Batch] = []
    for index, num_valid in enumerate(VALID):
        tokens_R = (torch.arange(B * T) * (index + 3)) % SPEC.vocab_size
        labels_R = tokens_R.where(torch.arange(B * T) < num_valid, IGNORED)
        documents_BT = torch.zeros(B, T, dtype=torch.int64)
        found.append(Batch(tokens_R.view(B, T), labels_R.view(B, T), documents_BT))
    return found


def traffic_of(plan: Plan, spec: ModelSpec = SPEC) -> list[Traffic]:
    """What each rank of a plan gives to collectives and sends in one step."""
    precision = PrecisionConfig(params="float64", compute="float64", reduce="float64")
    plan = replace(plan, precision=precision)

    def work(rank: int) -> dict[Any, int]:
        world = World(plan.mesh, rank, CPU)
        model = apply(spec, RandomWeights(spec, seed=3), plan, world)
        model.passes.train(batches(), next_token, lambda loss: loss)
        model.finish_gradients()
        found: Traffic = Counter()
        for operation, axes, size_bytes, purpose in world.traffic.transfers:
            found[operation, axes, purpose] += size_bytes
        return dict(found)

    return [Counter(found) for found in run_ranks(work, plan.mesh.num_ranks)]


def tensor_plan(tp: int, *, rows: bool, remat: Any = "none", **degrees: int) -> Plan:
    return Plan(
        mesh=MeshConfig(tp=tp, **degrees),
        zero=ZeroConfig(stage=0),
        tensor=TensorConfig(sequence_parallel=rows),
        memory=MemoryConfig(remat=remat),
    )


# Tensor parallelism


def hidden_bytes(spec: ModelSpec, tp: int, *, is_padded: bool) -> int:
    """A of the docstring: a micro-batch's hidden states, with padding to whole rows or without."""
    num_rows = tp * math.ceil(B * T / tp) if is_padded else B * T
    return num_rows * spec.d_model * HIDDEN


def num_split(spec: ModelSpec) -> int:
    """Attentions and feed-forwards whose matrices are split."""
    return sum(1 if spec.has_experts(layer) else 2 for layer in range(spec.num_layers))


def parameter_bytes(spec: ModelSpec, names: Sequence[str]) -> int:
    shapes = {name: p.shape for name, p in build(spec).named_parameters()}
    return sum(shapes[name].numel() for name in names) * PARAMETER


def whole_names(spec: ModelSpec, tp: int) -> list[str]:
    return [name for name, rule in decoder_rules(spec, tp).items() if rule.dim is None]


def copied_names(spec: ModelSpec, tp: int) -> list[str]:
    return [name for name, rule in decoder_rules(spec, tp).items() if rule.copied]


def tensor_traffic(spec: ModelSpec, tp: int, *, rows: bool) -> Traffic:
    """The formula of `paceline.parallel.tensor.decoder`."""
    size_bytes = hidden_bytes(spec, tp, is_padded=rows)
    loss_bytes = 3 * sum(VALID) * WIDE
    per_norm = 2 * 2 * spec.num_layers * B * T * WIDE if spec.qk_norm == "all" else 0
    crossings = M * (2 * num_split(spec) + 2) * size_bytes
    summed = [*whole_names(spec, tp)] if rows else []
    if not rows and spec.qk_norm != "none":
        summed = [n for n in whole_names(spec, tp) if "query_norm" in n or "key_norm" in n]
    found: Traffic = Counter()
    if rows:
        found["all-gather", ("tp",), PURPOSE] = crossings
        found["reduce-scatter", ("tp",), PURPOSE] = crossings
        found["all-reduce", ("tp",), PURPOSE] = loss_bytes + M * per_norm
    else:
        found["all-reduce", ("tp",), PURPOSE] = crossings + loss_bytes + M * per_norm
    of_step = parameter_bytes(spec, [*summed, *copied_names(spec, tp)])
    found["all-reduce", ("tp",), GRADIENTS] = of_step
    return +found


@pytest.mark.parametrize("rows", [True, False], ids=["rows", "whole"])
@pytest.mark.parametrize("tp", [2, 3, 4])
def test_tensor_ranks_send_what_the_formula_says(tp, rows):
    expected = tensor_traffic(SPEC, tp, rows=rows)
    assert traffic_of(tensor_plan(tp, rows=rows)) == [expected] * tp


@pytest.mark.parametrize(
    "spec",
    [
        MOE,
        replace(SPEC, tied_embeddings=False, qk_norm="head"),
        replace(SPEC, num_layers=2, qk_norm="all", norm_placement="after"),
        replace(SPEC, num_layers=2, positions="learned", norm="layer"),
    ],
    ids=["experts", "untied, norms of heads", "norms of all heads", "learned positions"],
)
@pytest.mark.parametrize("rows", [True, False], ids=["rows", "whole"])
def test_and_so_for_other_models(spec, rows):
    expected = tensor_traffic(spec, 2, rows=rows)
    assert traffic_of(tensor_plan(2, rows=rows), spec) == [expected] * 2


@pytest.mark.parametrize("remat", ["none", "full"])
def test_a_ladder_sends_what_a_plain_model_does_and_gradients_of_its_norms(remat):
    """And, where blocks are computed again, one sum of each ladder block's, not of its last."""
    spec = replace(SPEC, ladder_from=2)
    expected = tensor_traffic(SPEC, 2, rows=False)
    names = [
        name
        for name in whole_names(SPEC, 2)
        if name.startswith(("blocks.2.", "blocks.3.")) and "query_norm" not in name
    ]
    assert any(name.endswith("bias") for name in names)
    expected["all-reduce", ("tp",), GRADIENTS] += parameter_bytes(SPEC, names)
    if remat == "full":
        size_bytes = M * SPEC.num_layers * hidden_bytes(SPEC, 2, is_padded=False)
        expected["all-reduce", ("tp",), PURPOSE] += size_bytes
    found = traffic_of(tensor_plan(2, rows=False, remat=remat), spec)
    assert found == [expected] * 2


def test_gradients_of_copied_heads_go_over_the_data_ranks_that_share_them_too():
    """As whole gradients; what has been summed over data ranks already is not sent again."""
    plan = replace(tensor_plan(2, rows=True, dp_shard=2), zero=ZeroConfig(stage=3))
    copied_bytes = parameter_bytes(SPEC, copied_names(SPEC, 2))
    for found in traffic_of(plan):
        assert found["all-reduce", ("dp_shard",), GRADIENTS] == copied_bytes


def test_what_is_computed_again_is_sent_again():
    """But for the sum at a block's end, which nothing in the block's backward pass needs."""
    plain = tensor_traffic(SPEC, 2, rows=True)
    size_bytes = M * SPEC.num_layers * hidden_bytes(SPEC, 2, is_padded=True)
    plain["all-gather", ("tp",), PURPOSE] += 2 * size_bytes
    plain["reduce-scatter", ("tp",), PURPOSE] += size_bytes
    assert traffic_of(tensor_plan(2, rows=True, remat="full")) == [plain] * 2


# Pipelines


def pipeline_plan(schedule: str, pp: int) -> Plan:
    per_rank = SCHEDULES.load(schedule).min_stages_per_rank
    options = PipelineConfig.from_dict({"schedule": schedule, "stages_per_rank": per_rank})
    return Plan(mesh=MeshConfig(pp=pp), pipeline=options)


def stages_of(plan: Plan, rank: int) -> tuple[int, ...]:
    schedule = SCHEDULES.load(plan.pipeline.schedule)
    return schedule.stages_of(rank, plan.mesh.pp, plan.pipeline.stages_per_rank)


def num_borders(plan: Plan, rank: int, step: int) -> int:
    """Borders of a rank's stages to the next ones (1) or those before (-1), on other ranks."""
    own, num_stages = stages_of(plan, rank), plan.mesh.pp * plan.pipeline.stages_per_rank
    others = [stage + step for stage in own]
    return sum(other not in own and 0 <= other < num_stages for other in others)


def pipeline_traffic(plan: Plan, rank: int, *, border_bytes: int, tied_bytes: int) -> Traffic:
    """The formula of `paceline.parallel.pipeline.passes`."""
    up_bytes, down_bytes = (M * num_borders(plan, rank, step) * border_bytes for step in (1, -1))
    last_stage = plan.mesh.pp * plan.pipeline.stages_per_rank - 1
    num_ends = len({0, last_stage} & set(stages_of(plan, rank)))
    activations, gradients = PURPOSES
    sends = {activations: up_bytes, gradients: down_bytes}
    receives = {activations: down_bytes, gradients: up_bytes}
    if num_ends == 1:
        sends[TIED] = receives[TIED] = tied_bytes
    found: Traffic = Counter()
    for operation, by_purpose in (("send", sends), ("receive", receives)):
        for purpose, size_bytes in by_purpose.items():
            found[operation, ("pp",), purpose] = size_bytes
    return +found


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_stages_send_what_the_formula_says(schedule):
    plan, spec = pipeline_plan(schedule, 3), replace(SPEC, num_layers=6)
    border_bytes = B * T * spec.d_model * HIDDEN
    tied_bytes = spec.vocab_size * spec.d_model * PARAMETER
    expected = [
        pipeline_traffic(plan, rank, border_bytes=border_bytes, tied_bytes=tied_bytes)
        for rank in range(3)
    ]
    assert traffic_of(plan, spec) == expected


@pytest.mark.parametrize("rows", [True, False], ids=["rows", "whole"])
def test_stages_of_tensor_ranks_send_their_rows_or_all_of_them(rows):
    plan = replace(tensor_plan(3, rows=rows, pp=2), pipeline=PipelineConfig())
    num_rows = math.ceil(B * T / 3) if rows else B * T
    for rank, found in enumerate(traffic_of(plan)):
        stage, share = divmod(rank, 3)
        expected = pipeline_traffic(
            plan,
            stage,
            border_bytes=num_rows * SPEC.d_model * HIDDEN,
            tied_bytes=len(even_share(SPEC.vocab_size, 3, share)) * SPEC.d_model * PARAMETER,
        )
        assert {key: value for key, value in found.items() if key[1] == ("pp",)} == expected


def test_an_untied_pipeline_sends_no_gradient_of_its_ends():
    spec = replace(SPEC, tied_embeddings=False)
    for found in traffic_of(pipeline_plan("one-f-one-b", 2), spec):
        assert ("send", ("pp",), TIED) not in found


# Spread words


def spread_traffic(spec: ModelSpec, rank: int, p: int, barriers: int) -> Traffic:
    """The formula of `paceline.parallel.pipeline.spread_vocabulary`, first stage on the first rank.

    Of two ranks each receives what the formulas have the other send.
    """
    row_bytes, last = spec.d_model * HIDDEN, p - 1
    found: Traffic = Counter()

    def cross(purpose: str, source: int, destination: int, size_bytes: int) -> None:
        for operation, end in (("send", source), ("receive", destination)):
            if end == rank:
                found[operation, ("pp",), purpose] += size_bytes

    for batch in batches():
        num_labels = int((batch.labels_BT != IGNORED).sum())
        for other in range(p):
            words = even_share(spec.vocab_size, p, other)
            here, chosen = (
                int(((ids >= words.start) & (ids < words.stop)).sum())
                for ids in (batch.tokens_BT, batch.labels_BT)
            )
            if other != 0:
                cross("embedded rows", other, 0, here * row_bytes)
                cross("gradients of embedded rows", 0, other, here * row_bytes)
            if other != last:
                cross("hidden states", last, other, B * T * row_bytes)
                rows = num_labels + chosen * (barriers == 1)
                cross("terms of hidden states' gradients", other, last, rows * row_bytes)
            for third in set(range(p)) - {other}:
                cross("statistics of logits", other, third, 3 * num_labels * WIDE)
    return +found


@pytest.mark.parametrize("barriers", [1, 2])
@pytest.mark.parametrize(("p", "is_tied"), [(2, True), (3, False)])
def test_spread_words_send_what_the_formula_says(p, is_tied, barriers):
    plan = pipeline_plan("one-f-one-b", p)
    options = {"vocabulary": "spread", "vocabulary_barriers": barriers}
    plan = replace(plan, pipeline=replace(plan.pipeline, **options))
    spec = replace(SPEC, tied_embeddings=is_tied)
    border_bytes = B * T * spec.d_model * HIDDEN
    for rank, found in enumerate(traffic_of(plan, spec)):
        stages = pipeline_traffic(plan, rank, border_bytes=border_bytes, tied_bytes=0)
        assert found == stages + spread_traffic(spec, rank, p, barriers)


@pytest.mark.parametrize("barriers", [1, 2])
def test_data_ranks_gather_words_as_the_formula_says(barriers):
    """Of `paceline.parallel.data.parameter_sharded`: embedding once, head once a barrier."""
    options = {"vocabulary": "spread", "vocabulary_barriers": barriers}
    plan = Plan(
        mesh=MeshConfig(pp=2, dp_shard=2),
        zero=ZeroConfig(stage=3),
        pipeline=PipelineConfig.from_dict(options),
    )
    shapes = {name: tuple(p.shape) for name, p in build(SPEC).named_parameters()}

    def padded_bytes(shape: Sequence[int]) -> int:
        return 2 * -(-shape[0] // 2) * math.prod(shape[1:]) * PARAMETER

    for rank, found in enumerate(traffic_of(plan)):
        stage = rank // 2
        words = len(even_share(SPEC.vocab_size, 2, stage))
        word_bytes = padded_bytes((words, SPEC.d_model))
        layers = range(2 * stage, 2 * stage + 2)
        own = [name for name in shapes if name.startswith(tuple(f"blocks.{n}." for n in layers))]
        stage_bytes = sum(padded_bytes(shapes[name]) for name in own)
        stage_bytes += padded_bytes(shapes["norm.weight"]) * stage
        gathered = found["all-gather", ("dp_shard",), "parameters"]
        assert gathered == M * (2 * stage_bytes + (1 + barriers) * word_bytes)
        reduced = found["reduce-scatter", ("dp_shard",), "gradients"]
        assert reduced == M * (stage_bytes + 2 * word_bytes)
