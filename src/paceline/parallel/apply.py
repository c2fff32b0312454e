"""Parallelism applied to a plain model, in one fixed order.

peft -> freeze -> pp -> tp -> ep -> cp -> remat -> compile -> data -> memory and weights
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial

import torch
from torch import Tensor

from paceline.core.errors import ConfigError, Problem
from paceline.dist.world import World
from paceline.kernels.device import choose_dtype
from paceline.memory.remat import REMAT
from paceline.memory.remat.base import Remat
from paceline.models.attention import Attention
from paceline.models.decoder import Decoder
from paceline.models.peft.attach import attach
from paceline.models.weights import Weights, build, fill
from paceline.optim.parts import Part
from paceline.parallel.context.share import SharedSequences
from paceline.parallel.data import STAGES
from paceline.parallel.data.base import DataParallel
from paceline.parallel.expert.experts import SHARING, SplitExperts, split_experts
from paceline.parallel.expert.load import ExpertLoad, watch_experts
from paceline.parallel.part_weights import PartWeights
from paceline.parallel.pipeline import SCHEDULES
from paceline.parallel.pipeline.base import Schedule
from paceline.parallel.pipeline.partition import word_costs
from paceline.parallel.pipeline.passes import EMBEDDING, Passes
from paceline.parallel.pipeline.stages import border_of, cut_of, defer, keep_stages, stage_models
from paceline.parallel.pipeline.words import Shares, Spread, spread_words
from paceline.parallel.tensor.decoder import SplitDecoder, split
from paceline.plan.layout import Place
from paceline.plan.model_spec import ModelSpec
from paceline.plan.plan import Plan


@dataclass(frozen=True, slots=True)
class ParallelModel:
    """A model laid over the ranks of a world.

    Attributes:
        module: this rank's part; without a pipeline, to be called as the plain model.
        passes: runs micro-batches through it.
        data: how data ranks share its state.
        parts: what this rank holds of each parameter.
        tensor: how its matrices are split over ranks, if they are.
        context: how its sequences are shared by ranks, if they are.
        experts: how its experts are shared out over ranks, if they are.
        load: of its experts, if it has any.
        added: names of the parameters that fine-tuning has added, if it has: the only ones that
            are trained and saved.
    """

    module: Decoder
    passes: Passes
    data: DataParallel
    parts: dict[str, Part]
    tensor: SplitDecoder | None = None
    context: SharedSequences | None = None
    experts: SplitExperts | None = None
    load: ExpertLoad | None = None
    added: frozenset[str] = frozenset()

    @property
    def spread_axes(self) -> tuple[str, ...]:
        """Mesh axes over which parameters are spread."""
        of_experts = () if self.experts is None else SHARING
        return tuple(dict.fromkeys((*self.data.spread_axes, *of_experts, "tp", "pp")))

    def finish_gradients(self) -> None:
        """Called after the last backward of a step; then gradients of parts are whole sums."""
        self.data.finish_gradients(self.module)
        if self.experts is not None:
            self.experts.finish_gradients(self.parts)
        if self.context is not None:
            apart = self.experts.names if self.experts else frozenset[str]()
            names = [name for name in self.parts if name not in apart]
            self.context.finish_gradients(self.parts, names, self.data.reduce_dtype)
        if self.tensor is not None:
            self.tensor.finish_gradients(self.parts, self.data.spread_axes)
        self.passes.finish_gradients(self.parts)

    def finish_update(self) -> None:
        """Called after the optimizer has moved the parts, or a checkpoint has filled them."""
        self.data.finish_update(self.module)

    def finish_evaluation(self) -> None:
        """Called after forward passes that no backward pass follows."""
        self.data.finish_evaluation(self.module)

    def statistics(self) -> dict[str, float]:
        """What modules have counted since they were last asked, by name; all ranks ask together."""
        return {} if self.load is None else self.load.statistics()

    def parameters(self) -> list[Tensor]:
        """What optimizers move: the parts, frozen ones among them."""
        return [part.tensor for part in self.parts.values()]


def apply(
    spec: ModelSpec, weights: Weights, plan: Plan, world: World, *, added: Weights | None = None
) -> ParallelModel:
    """Builds a model on this rank as the plan says, with its weights.

    Args:
        spec: sizes of the model.
        weights: of the model.
        plan: how.
        world: the ranks.
        added: values of what fine-tuning adds; absent: its method's start values.

    Raises:
        ConfigError: a pattern that matches nothing.
    """
    model = build(spec, choose_dtype(plan.precision.params, world.device))
    model.compute_dtype = choose_dtype(plan.precision.compute, world.device)
    attached = attach(model, plan.peft, weights, seed=plan.train.seed, added=added)
    freeze(model, plan.train.freeze)
    cut = cut_of(plan, spec, world.coordinate("pp"))
    deferred = defer(model, plan)
    keep_stages(model, cut)
    degree, rank = world.degree("pp"), world.coordinate("pp")
    shares = Shares.of(spec.vocab_size, degree, rank) if cut.is_spread else None
    of_words = spread_words(model, shares) if shares else {}
    tensor, places = _split(model, spec, plan, world)
    places |= of_words
    stage: type[DataParallel] = STAGES.load(plan.zero_technique)
    experts = _share_out(model, plan, world)
    if experts is not None:
        places = experts.among(places, stage.spread_axes)
        tensor = None if tensor is None else tensor.without(experts.names)
    load = watch_experts(model, spec, plan, world)
    if cut.other_end is not None and cut.has_last:
        places[EMBEDDING] = places[EMBEDDING].disowned()
    context = SharedSequences(plan, world) if plan.mesh.cp > 1 else None
    if context is not None:
        model.attend = context.attend
    recompute(model, REMAT.load(plan.memory.remat))
    if is_compiled(plan, world.device):
        for block in model.blocks:
            block.compile()
    data = stage(world, plan.precision, frozenset() if experts is None else experts.names)
    data.wrap(model)
    fill(model, PartWeights(attached.weights, places), world.device, put=data.put)
    passes = Passes(
        cut,
        stage_models(model, cut),
        schedule=SCHEDULES.load(plan.pipeline.schedule),
        stages_per_rank=plan.pipeline.stages_per_rank,
        border=partial(border_of, model, plan),
        world=world,
        deferred=deferred,
        spread=_spread(model, spec, plan, shares, data) if shares else None,
        run_stage=data.run_stage,
        on_ready=data.on_ready,
        finished=partial(data.finish_pass, model),
        share=context.share if context else lambda batch: batch,
    )
    parts = data.hold(model, places)
    return ParallelModel(model, passes, data, parts, tensor, context, experts, load, attached.added)


def _spread(
    model: Decoder, spec: ModelSpec, plan: Plan, shares: Shares, data: DataParallel
) -> Spread:
    """How the words of the model are spread over the pipeline."""
    degree = plan.mesh.pp
    costs = word_costs(
        spec,
        plan.train.sequence_length,
        num_stages=degree * plan.pipeline.stages_per_rank,
        num_ranks=degree,
    )
    return Spread(model, shares, plan.pipeline.vocabulary_barriers, costs, data.run_words)


def _split(
    model: Decoder, spec: ModelSpec, plan: Plan, world: World
) -> tuple[SplitDecoder | None, dict[str, Place]]:
    """Splits the model over tensor ranks, if there are several; where its parameters lie."""
    if plan.mesh.tp == 1:
        named = model.named_parameters()
        return None, {name: Place.of_whole(tuple(p.shape)) for name, p in named}
    tensor = split(model, spec, world, is_sequence_parallel=plan.tensor.sequence_parallel)
    return tensor, dict(tensor.places)


def _share_out(model: Decoder, plan: Plan, world: World) -> SplitExperts | None:
    """Shares experts out over ranks, if there are several."""
    if plan.mesh.ep == 1:
        return None
    reduce_dtype = choose_dtype(plan.precision.reduce, world.device)
    return split_experts(model, world, dispatch=plan.expert.dispatch, reduce_dtype=reduce_dtype)


def recompute(model: Decoder, remat: Remat) -> None:
    """Has parts of the model computed again in the backward pass."""
    if remat.around_block is not None:
        model.around_block = remat.around_block
    for module in model.modules():
        if isinstance(module, Attention) and remat.around_core is not None:
            module.around_core = remat.around_core


def is_compiled(plan: Plan, device: torch.device) -> bool:
    """Whether blocks are compiled on a device; for float64, which proves plans, only when told."""
    if plan.train.compile != "auto":
        return plan.train.compile == "on"
    schedule: Schedule = SCHEDULES.load(plan.pipeline.schedule)
    mesh = plan.mesh
    is_plain = mesh.tp == mesh.pp == mesh.cp == mesh.ep == 1 and not schedule.splits_backward
    return is_plain and device.type == "cuda" and plan.precision.compute != "float64"


def freeze(model: Decoder, patterns: tuple[str, ...]) -> None:
    """Stops gradients for the parameters whose names match a pattern."""
    names = {name for name, _ in model.named_parameters()}
    for pattern in patterns:
        matched = {name for name in names if fnmatchcase(name, pattern)}
        if not matched:
            example = sorted(names)[0]
            rule, hint = "matches no parameter", f"names look like {example}"
            raise ConfigError([Problem("train.freeze", pattern, rule, hint)])
        for name in matched:
            model.get_parameter(name).requires_grad_(False)
