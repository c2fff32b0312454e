"""What data parallelism costs: counted bytes and held bytes equal the formulas of each stage."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from paceline.data.batch import Batch
from paceline.dist.testing import run_ranks
from paceline.dist.world import World
from paceline.models.families.llama import PRESETS
from paceline.models.weights import RandomWeights, build
from paceline.optim import OPTIMIZERS
from paceline.optim.parts import local
from paceline.parallel import buckets
from paceline.parallel.apply import apply
from paceline.plan.mesh import DATA_AXES, MeshConfig
from paceline.plan.model_spec import ModelSpec
from paceline.plan.plan import PeftConfig, Plan, PrecisionConfig, TrainConfig, ZeroConfig
from paceline.train.objective.next_token import next_token
from paceline.train.state import State
from paceline.train.step import train_step

pytestmark = [pytest.mark.cpu, pytest.mark.ranks]

CPU = torch.device("cpu")
TIED = PRESETS["tiny"]  # 259 words: no degree divides them
UNTIED = ModelSpec(
    family="llama",
    vocab_size=37,
    d_model=20,
    num_layers=2,
    num_heads=5,
    num_kv_heads=1,
    head_dim=4,
    d_ffn=27,
    max_positions=24,
    qkv_bias=True,
    output_bias=True,
    ffn_bias=True,
)
FROZEN = TrainConfig(freeze=("blocks.1.ffn.*", "norm.weight"))
NUM_MICROBATCHES = 3
STAGES = {
    "0": ZeroConfig(stage=0),
    "1": ZeroConfig(stage=1),
    "2": ZeroConfig(stage=2),
    "3": ZeroConfig(stage=3),
    "3-own": ZeroConfig(sharder="own"),
}
MESHES = {
    "2": MeshConfig(dp_shard=2),
    "3": MeshConfig(dp_shard=3),
    "2x2": MeshConfig(dp_replicate=2, dp_shard=2),
}
MODELS = {"tied": (TIED, Plan()), "untied, frozen": (UNTIED, Plan(train=FROZEN))}
SLOW = pytest.mark.slow
WHERE = [
    ("3", "tied"),
    ("2x2", "untied, frozen"),
    *(
        pytest.param(mesh, model, marks=SLOW)
        for mesh, model in (("2", "tied"), ("2x2", "tied"), ("2", "untied, frozen"))
    ),
]


def begin(plan: Plan, spec: ModelSpec, rank: int) -> tuple[State, World]:
    world = World(plan.mesh, rank, CPU)
    model = apply(spec, RandomWeights(spec), plan, world)
    optimizer = OPTIMIZERS.load(plan.optimizer.name)(model.parameters(), plan.optimizer)
    return State(model, optimizer), world


def batches(world: World, spec: ModelSpec) -> list[Batch]:
    found = []
    for index in range(NUM_MICROBATCHES):
        start = 7 * world.data_index + index
        tokens_BT = (torch.arange(10).view(2, 5) + start) % (spec.vocab_size - 1)
        found.append(Batch(tokens_BT, tokens_BT + 1, torch.zeros_like(tokens_BT)))
    return found


def step(state: State, world: World, spec: ModelSpec, objective: Any = next_token) -> None:
    train_step(state, batches(world, spec), objective, world, learning_rate=0.1, max_norm=1.0)


class Sizes:
    """Elements of a model's parameters, padded as `degree` ranks share them.

    Args:
        shapes: of all parameters.
        trained: names of those with a gradient.
        degree: of dp_shard.
    """

    def __init__(self, shapes: dict[str, tuple[int, ...]], trained: set[str], degree: int) -> None:
        self.plain = {name: math.prod(shape) for name, shape in shapes.items()}
        self.padded = {
            name: math.ceil(shape[0] / degree) * degree * math.prod(shape[1:])
            for name, shape in shapes.items()
        }
        self.trained = trained

    def all(self) -> int:
        return sum(self.padded.values())

    def of(self, names: set[str]) -> int:
        return sum(self.padded[name] for name in names)

    @property
    def blocks(self) -> int:
        return self.of({name for name in self.padded if name.startswith("blocks.")})


def sizes_of(state: State, degree: int) -> Sizes:
    parts = state.model.parts
    shapes = {name: part.place.shape for name, part in parts.items()}
    return Sizes(shapes, {n for n, p in parts.items() if p.tensor.requires_grad}, degree)


def expected_traffic(plan: Plan, spec: ModelSpec, sizes: Sizes) -> dict[Any, int]:
    """Bytes of a step by operation, axes and purpose, as the stages' docstrings give them."""
    width = {"float32": 4, "bfloat16": 2}
    params, compute, reduce = (width[dtype] for dtype in plan.precision.to_dict().values())
    trained, shard, m = sizes.of(sizes.trained), plan.mesh.dp_shard, NUM_MICROBATCHES
    table = 0 if spec.tied_embeddings else sizes.padded["embedding.weight"]
    scatter = ("reduce-scatter", ("dp_shard",), "gradients")
    gather = ("all-gather", ("dp_shard",), "parameters")
    whole = ("all-reduce", DATA_AXES, "gradients")
    expected = {
        "0": {whole: sum(sizes.plain[name] for name in sizes.trained) * reduce},
        "1": {scatter: trained * reduce, gather: trained * params},
        "2": {scatter: m * trained * reduce, gather: trained * params},
        "3": {
            scatter: m * trained * reduce,
            gather: m * (sizes.all() + sizes.blocks) * compute,
        },
        "3-own": {
            scatter: m * trained * reduce,
            gather: m * (2 * sizes.all() - table) * params,
        },
    }[plan.zero_technique]
    if plan.mesh.dp_replicate > 1 and plan.zero_stage:
        times = m if plan.zero_technique == "3" else 1
        expected["all-reduce", ("dp_replicate",), "gradients"] = times * trained * reduce // shard
    return expected


def counted(world: World) -> dict[Any, int]:
    found: Counter[Any] = Counter()
    for transfer in world.traffic.transfers:
        if transfer.purpose in ("gradients", "parameters"):
            key = transfer.operation, transfer.axes, transfer.purpose
            found[key] += transfer.size_bytes
    return dict(found)


def check_traffic(plan: Plan, spec: ModelSpec) -> None:
    def run(rank: int) -> Any:
        state, world = begin(plan, spec, rank)
        seen = []
        for _ in range(2):  # the second step costs as much as the first
            world.traffic.transfers.clear()
            step(state, world, spec)
            seen.append(counted(world))
        return seen, expected_traffic(plan, spec, sizes_of(state, plan.mesh.dp_shard))

    for seen, expected in run_ranks(run, plan.mesh.num_ranks):
        assert seen == [expected, expected]


@pytest.mark.parametrize(("mesh", "model"), WHERE)
@pytest.mark.parametrize("stage", STAGES)
def test_counted_bytes_equal_the_formula(stage, mesh, model):
    spec, plan = MODELS[model]
    check_traffic(replace(plan, mesh=MESHES[mesh], zero=STAGES[stage]), spec)


@pytest.mark.parametrize("stage", STAGES)
def test_counted_bytes_follow_the_dtypes_and_not_the_buckets(monkeypatch, stage):
    monkeypatch.setattr(buckets, "BUCKET_BYTES", 4096)
    precision = PrecisionConfig(compute="bfloat16", reduce="bfloat16")
    plan = Plan(mesh=MESHES["2x2"], zero=STAGES[stage], precision=precision)
    check_traffic(plan, TIED)


@pytest.mark.parametrize("stage", ["1", "3", "3-own"])
def test_tensors_of_fewer_rows_than_ranks_cost_a_row_on_each(stage):
    peft = PeftConfig(method="lora", rank=2)  # of three ranks one has no row of the first factor
    check_traffic(Plan(mesh=MESHES["3"], zero=STAGES[stage], peft=peft), UNTIED)


def storage_bytes(tensors: Any) -> int:
    """Bytes of memory behind some tensors, each piece counted once."""
    storages = [local(tensor).untyped_storage() for tensor in tensors if tensor is not None]
    return sum({s.data_ptr(): s.nbytes() for s in storages if s.nbytes()}.values())


def held(state: State) -> dict[str, int]:
    """Bytes of parameters, gradients and moments that a rank holds."""
    parameters = [*state.model.module.parameters(), *state.model.parameters()]
    moments = [
        value
        for of_one in state.optimizer.state.values()
        for value in of_one.values()
        if value.ndim
    ]
    return {
        "parameters": storage_bytes(parameters),
        "gradients": storage_bytes(parameter.grad for parameter in parameters),
        "moments": storage_bytes(moments),
    }


def expected_held(plan: Plan, rank: int, spec: ModelSpec) -> tuple[dict[str, int], int]:
    """Between steps, and the gradients at the end of a step's last backward pass.

    ZeRO, Fig. 1: everything; optimizer state split; gradients too; parameters too. What is split
    is a rank's own rows, and of gradients, and of torch's parameters, the longest share.
    """
    degree = plan.mesh.dp_shard
    index = plan.mesh.coordinate(rank)["dp_shard"]
    shapes = {name: tuple(p.shape) for name, p in build(spec).named_parameters()}
    whole = sum(math.prod(shape) for shape in shapes.values())
    longest = sum(math.ceil(s[0] / degree) * math.prod(s[1:]) for s in shapes.values())
    own = sum(
        len(range(s[0])[index * (n := math.ceil(s[0] / degree)) : (index + 1) * n])
        * math.prod(s[1:])
        for s in shapes.values()
    )
    parameters = {"3": longest, "3-own": own}.get(plan.zero_technique, whole)
    gradients = longest if plan.zero_stage >= 2 else whole
    moments = 2 * (own if plan.zero_stage else whole)
    return {"parameters": 4 * parameters, "gradients": 0, "moments": 4 * moments}, 4 * gradients


@pytest.mark.parametrize("mesh", ["3", *(pytest.param(m, marks=SLOW) for m in ("2", "2x2"))])
@pytest.mark.parametrize("stage", STAGES)
def test_held_bytes_equal_zero_s_figure(stage, mesh):
    plan = Plan(mesh=MESHES[mesh], zero=STAGES[stage])

    def run(rank: int) -> Any:
        state, world = begin(plan, TIED, rank)
        original = state.model.data.finish_gradients
        at_the_end = []

        def finish(model: Any) -> None:
            at_the_end.append(held(state))
            original(model)

        state.model.data.finish_gradients = finish  # type: ignore[method-assign]
        before = held(state)
        step(state, world, TIED)
        return before, at_the_end, held(state)

    for rank, (before, (last,), after) in enumerate(run_ranks(run, plan.mesh.num_ranks)):
        between, gradients = expected_held(plan, rank, TIED)
        assert after == between
        if plan.zero_technique != "3":  # torch pads its parts in the first pass
            assert before == between
        assert last == between | {"gradients": gradients}


@pytest.mark.parametrize("is_untied", [False, True])
@pytest.mark.parametrize("remat", ["none", "full"])
def test_only_the_unit_in_use_is_whole(is_untied, remat):
    """Of the own stage 3; what is outside the blocks is open during the forward pass."""
    spec = UNTIED if is_untied else TIED
    plan = Plan(mesh=MESHES["2"], zero=STAGES["3-own"]).with_overrides([f'memory.remat="{remat}"'])

    def run(rank: int) -> Any:
        state, world = begin(plan, spec, rank)
        model, seen = state.model.module, []

        def look(where: str) -> None:
            named = model.named_parameters()
            whole = {name for name, p in named if p.untyped_storage().size()}
            seen.append((where, {".".join(name.split(".")[:2]) for name in whole}))

        for layer, block in enumerate(model.blocks):
            block.ffn.register_forward_pre_hook(lambda *_, n=layer: look(f"forward {n}"))
            block.ffn.register_full_backward_hook(lambda *_, n=layer: look(f"backward {n}"))
        loss = next_token(model, batches(world, spec)[0])
        look("between")
        loss.backward()
        state.model.data.finish_pass(state.model.module)
        look("after")
        return seen

    outside = {"embedding.weight"}
    for seen in run_ranks(run, 2):
        last = spec.num_layers - 1
        for where, whole in seen:
            kind, _, layer = where.partition(" ")
            block = {f"blocks.{layer}"} if layer else set()
            is_recomputed = remat == "full" and len([w for w, _ in seen if w == where]) > 1
            if kind == "forward" and not is_recomputed:
                assert whole == block | outside, where
            elif kind == "backward":
                assert whole == block, (where, whole)
            elif not layer:
                assert whole == set(), where
        assert [where for where, _ in seen if where.startswith("backward")] == [
            f"backward {layer}" for layer in range(last, -1, -1)
        ]


@pytest.mark.parametrize("freeze", [("embedding.*", "blocks.*"), ("*",)[:0]])
def test_nothing_is_whole_after_a_pass_even_where_no_gradient_flows(freeze):
    plan = Plan(mesh=MESHES["2"], zero=STAGES["3-own"], train=TrainConfig(freeze=freeze))

    def run(rank: int) -> Any:
        state, world = begin(plan, UNTIED, rank)
        next_token(state.model.module, batches(world, UNTIED)[0]).backward()
        state.model.data.finish_pass(state.model.module)
        whole = [n for n, p in state.model.module.named_parameters() if p.untyped_storage().size()]
        step(state, world, UNTIED)
        with torch.no_grad():
            next_token(state.model.module, batches(world, UNTIED)[0])
        state.model.finish_evaluation()
        return whole, storage_bytes(state.model.module.parameters())

    assert run_ranks(run, 2) == [([], 0)] * 2
