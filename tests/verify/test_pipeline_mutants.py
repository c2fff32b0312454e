"""Deliberate defects in a decoder cut into pipeline stages, each of which `certify` catches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import count
from typing import Any

import pytest
import torch
from mutation import (
    PACKED,
    PADDED,
    Defects,
    Patch,
    assert_caught,
    certify_with,
    clip_by_own_norm,
    count_tokens_along,
    nothing,
    plan_of,
    recompute_from,
)
from torch import Tensor

from paceline.dist.p2p import PendingTensor, PointToPoint
from paceline.dist.world import World
from paceline.kernels import deferred
from paceline.kernels.deferred import DeferredGradients
from paceline.models.decoder import Decoder
from paceline.models.families.llama import PRESETS
from paceline.models.layout import Layout
from paceline.optim.scale import LossScale
from paceline.parallel import apply as apply_module
from paceline.parallel.apply import ParallelModel
from paceline.parallel.data.replicated import Replicated
from paceline.parallel.pipeline import stages as stages_module
from paceline.parallel.pipeline.base import Action, Kind, RankActions
from paceline.parallel.pipeline.passes import EMBEDDING, Passes
from paceline.parallel.pipeline.runtime import PURPOSES, Runtime
from paceline.parallel.pipeline.stages import StageModel
from paceline.parallel.tensor.decoder import SplitDecoder
from paceline.plan.plan import PipelineConfig
from paceline.train import step as step_module

pytestmark = [pytest.mark.cpu, pytest.mark.ranks, pytest.mark.slow]

SPEC = replace(
    PRESETS["tiny"],
    vocab_size=43,
    d_model=24,
    num_layers=4,
    num_heads=3,
    num_kv_heads=1,
    head_dim=4,
    d_ffn=20,
    max_positions=32,
    qkv_bias=True,
)


def pipeline(schedule: str = "one-f-one-b", **options: Any) -> PipelineConfig:
    return PipelineConfig.from_dict({"schedule": schedule, "num_microbatches": 3, **options})


TWO = plan_of(pp=2, sequences=3)
SPLIT = plan_of(pp=2, sequences=3, pipeline=pipeline("zero-bubble"))
V = plan_of(pp=2, sequences=3, pipeline=pipeline("zero-bubble-v", stages_per_rank=2))
INTERLEAVED = plan_of(
    pp=2,
    sequences=4,
    pipeline=pipeline("interleaved", stages_per_rank=2, num_microbatches=4),
)
RECOMPUTED = plan_of(pp=2, sequences=3, remat="full")
REPLICATED = plan_of(pp=2, dp_replicate=2, sequences=6)
TENSOR = plan_of(pp=2, tp=2, length=17, sequences=3)

ACTIVATIONS, _ = PURPOSES

DEFECTS = Defects(SPEC)
mutant = DEFECTS.of


@pytest.mark.parametrize(
    "plan",
    [TWO, SPLIT, V, INTERLEAVED, RECOMPUTED, REPLICATED, TENSOR],
    ids=["two", "split", "v", "interleaved", "recomputed", "replicated", "tensor"],
)
def test_without_a_defect_the_same_path_is_certified(monkeypatch, plan):
    cases = [PACKED, PADDED] if plan is TWO else [PADDED]
    certificate = certify_with(monkeypatch, plan, SPEC, nothing, *cases)
    assert certificate.certified, certificate.worst


# Which micro-batch


def _with_batch(patch: Patch, other: Callable[[int, int], int]) -> None:
    """Has stages run another micro-batch of the data, where they are trained on it."""
    original = Passes._forward

    def forward(self: Passes, stage: int, microbatch: int, x: Tensor | None) -> Tensor:
        if not torch.is_grad_enabled():
            return original(self, stage, microbatch, x)
        batches, taken = self._batches, other(stage, microbatch)
        self._batches = [batches[taken] for _ in batches]
        y = original(self, stage, microbatch, x)
        self._batches = batches
        return y

    patch.setattr(Passes, "_forward", forward)


@mutant(TWO)
def last_stage_s_micro_batches_swapped(patch: Patch, _rank: int) -> None:
    _with_batch(patch, lambda stage, microbatch: 2 - microbatch if stage else microbatch)


@mutant(V)
def one_stage_s_layout_of_the_next_micro_batch(patch: Patch, _rank: int) -> None:
    _with_batch(patch, lambda stage, microbatch: (microbatch + (stage == 1)) % 3)


@mutant(TWO)
def a_micro_batch_run_twice_in_place_of_another(patch: Patch, _rank: int) -> None:
    _with_batch(patch, lambda _stage, microbatch: min(microbatch, 1))


def _stale(patch: Patch, kind: Kind) -> None:
    """Gives passes what the one before has taken, as a buffer does that is not yet overwritten."""
    original = Runtime._take
    held: dict[int, Tensor] = {}

    def take(self: Runtime, receive: Action) -> Tensor:
        found = original(self, receive)
        if receive.kind is not kind:
            return found
        before = held.get(receive.stage, found).detach().clone()
        held[receive.stage] = found
        return before

    patch.setattr(Runtime, "_take", take)


@mutant(TWO)
def activations_of_the_micro_batch_before(patch: Patch, _rank: int) -> None:
    _stale(patch, Kind.RECEIVE_FORWARD)


@mutant(SPLIT, PACKED)
def an_activation_sent_twice_and_the_next_never(patch: Patch, _rank: int) -> None:
    original, sent = PointToPoint.send, list[Tensor]()

    def send(self: PointToPoint, tensor: Tensor, destination: int, purpose: str) -> None:
        if purpose == ACTIVATIONS:
            sent.append(tensor)
            tensor = sent[-2] if len(sent) % 3 == 2 else tensor
        original(self, tensor, destination, purpose)

    patch.setattr(PointToPoint, "send", send)


@mutant(INTERLEAVED)
def gradients_of_the_micro_batch_before(patch: Patch, _rank: int) -> None:
    _stale(patch, Kind.RECEIVE_BACKWARD)


@mutant(SPLIT)
def backward_pass_through_another_micro_batch_s_graph(patch: Patch, _rank: int) -> None:
    original = Runtime._backpropagate

    def through(self: Runtime, action: Action) -> None:
        kept = self._kept
        mine = action.stage, action.microbatch
        other = next((key for key in kept if key[0] == action.stage and key != mine), mine)
        kept[mine], kept[other] = kept[other], kept[mine]
        original(self, action)

    patch.setattr(Runtime, "_backpropagate", through)


# Between the stages


@mutant(TWO)
def gradient_of_a_stage_s_input_lost(patch: Patch, _rank: int) -> None:
    original = Runtime._leave

    def leave(self: Runtime, send: Action, tensor: Tensor) -> None:
        is_gradient = send.kind is Kind.SEND_BACKWARD
        original(self, send, torch.zeros_like(tensor) if is_gradient else tensor)

    patch.setattr(Runtime, "_leave", leave)


@mutant(TWO, error="the output does not depend on the input")
def a_stage_s_input_detached(patch: Patch, _rank: int) -> None:
    original = StageModel.__call__

    def call(self: StageModel, *arguments: Any, **options: Any) -> Tensor:
        if self.given is not None:
            self.given = self.given.detach()
        return original(self, *arguments, **options)

    patch.setattr(StageModel, "__call__", call)


@mutant(V)
def activations_handed_on_in_float32(patch: Patch, _rank: int) -> None:
    original = Runtime._leave
    patch.setattr(
        Runtime, "_leave", lambda self, send, x: original(self, send, x.float().to(x.dtype))
    )


@mutant(TWO, PACKED)
def document_mask_lost_behind_the_first_stage(patch: Patch, _rank: int) -> None:
    original = StageModel.__call__

    def call(self: StageModel, tokens_BT: Tensor, layout: Layout, **options: Any) -> Tensor:
        return original(self, tokens_BT, None if self.given is not None else layout, **options)

    patch.setattr(StageModel, "__call__", call)


# Which layers


def _cut_at(patch: Patch, *layers: range) -> None:
    patch.setattr(stages_module, "stage_layers", lambda *_arguments, **_options: layers)


@mutant(TWO)
def a_layer_on_two_stages(patch: Patch, _rank: int) -> None:
    _cut_at(patch, range(3), range(2, 4))


@mutant(TWO)
def a_layer_on_no_stage(patch: Patch, _rank: int) -> None:
    _cut_at(patch, range(2), range(3, 4))


@mutant(V)
def stages_of_a_rank_in_the_wrong_order(patch: Patch, _rank: int) -> None:
    original = apply_module.stage_models

    def swapped(model: Any, cut: Any) -> Any:
        layers = list(cut.layers)
        layers[0], layers[-1] = layers[-1], layers[0]
        return original(model, replace(cut, layers=tuple(layers)))

    patch.setattr(apply_module, "stage_models", swapped)


# The passes


@mutant(SPLIT)
def a_weight_pass_dropped(patch: Patch, _rank: int) -> None:
    original = Runtime._backward_weight

    def backward(self: Runtime, action: Action) -> None:
        if action.microbatch != 1:
            original(self, action)

    patch.setattr(Runtime, "_backward_weight", backward)


@mutant(V)
def a_weight_pass_run_twice(patch: Patch, _rank: int) -> None:
    original = DeferredGradients.compute

    def compute(self: DeferredGradients, key: Any, on_ready: Any = None) -> None:
        owed = list(self._owed.get(key, []))
        original(self, key, on_ready)
        if key == (0, 1):
            self._owed[key] = owed
            original(self, key, on_ready)

    patch.setattr(DeferredGradients, "compute", compute)


@mutant(SPLIT, PACKED)
def weight_passes_that_overwrite(patch: Patch, _rank: int) -> None:
    original = DeferredGradients.compute

    def compute(self: DeferredGradients, key: Any, on_ready: Any = None) -> None:
        for product in self._owed.get(key, []):
            if product.weight is not None:
                product.weight.grad = None
        original(self, key, on_ready)

    patch.setattr(DeferredGradients, "compute", compute)


@mutant(SPLIT)
def weight_passes_of_two_matrices_swapped(patch: Patch, _rank: int) -> None:
    original = DeferredGradients.compute

    def compute(self: DeferredGradients, key: Any, on_ready: Any = None) -> None:
        owed = self._owed[key]
        key_and_value = [
            i for i, p in enumerate(owed) if p.weight is not None and len(p.weight) == 4
        ]
        first, second = key_and_value[:2]
        owed[first], owed[second] = (
            owed[first]._replace(weight=owed[second].weight),
            owed[second]._replace(weight=owed[first].weight),
        )
        original(self, key, on_ready)

    patch.setattr(DeferredGradients, "compute", compute)


@mutant(SPLIT)
def weight_pass_with_another_micro_batch_s_input(patch: Patch, _rank: int) -> None:
    original = deferred._weight_gradients
    held: dict[int, Tensor] = {}

    def gradients(product: Any) -> Any:
        x = held.get(id(product.weight), product.x)
        held[id(product.weight)] = product.x
        return original(product._replace(x=x))

    patch.setattr(deferred, "_weight_gradients", gradients)


@mutant(SPLIT)
def gradients_of_biases_forgotten(patch: Patch, _rank: int) -> None:
    original = deferred._weight_gradients
    patch.setattr(deferred, "_weight_gradients", lambda product: (original(product)[0], None))


@mutant(TWO)
def first_stage_keeps_its_last_micro_batch_alone(patch: Patch, rank: int) -> None:
    original = Runtime._backpropagate

    def alone(self: Runtime, action: Action) -> None:
        if rank == 0:
            model = self._stage_forward.__self__._models[0]._model  # type: ignore[attr-defined]
            model.zero_grad()
        original(self, action)

    patch.setattr(Runtime, "_backpropagate", alone)


@mutant(RECOMPUTED)
def a_block_computed_again_from_something_else(patch: Patch, rank: int) -> None:
    recompute_from(patch, 1 + 0.001 * rank)


# The matrix that is embedding and head


@mutant(TWO)
def tied_gradient_summed_twice(patch: Patch, _rank: int) -> None:
    original = Passes.finish_gradients

    def finish(self: Passes, parts: Any) -> None:
        original(self, parts)
        original(self, parts)

    patch.setattr(Passes, "finish_gradients", finish)


@mutant(TWO)
def one_end_of_a_tied_matrix_alone(patch: Patch, rank: int) -> None:
    """The rank with the head forgets what the embedding adds; the two copies part."""
    original = PendingTensor.wait

    def wait(self: PendingTensor) -> Tensor:
        tensor = original(self)
        is_matrix = tuple(tensor.shape) == (SPEC.vocab_size, SPEC.d_model)
        return tensor * 0 if rank == 1 and is_matrix else tensor

    patch.setattr(PendingTensor, "wait", wait)


@mutant(TWO)
def tied_matrix_counted_on_no_stage(patch: Patch, _rank: int) -> None:
    original = apply_module._split

    def split(*arguments: Any) -> Any:
        tensor, places = original(*arguments)
        return tensor, places | {EMBEDDING: places[EMBEDDING].disowned()}

    patch.setattr(apply_module, "_split", split)


@mutant(V)
def tied_head_s_gradient_dropped(patch: Patch, _rank: int) -> None:
    original = Decoder.head_weight.fget  # type: ignore[attr-defined]
    patch.setattr(Decoder, "head_weight", property(lambda self: original(self).detach()))


# The norm, the clip and the scale


@mutant(TENSOR)
def norm_of_stages_of_one_tensor_rank(patch: Patch, _rank: int) -> None:
    patch.setattr(ParallelModel, "spread_axes", ("pp",))


@mutant(TWO)
def each_stage_clips_by_its_own_norm(patch: Patch, _rank: int) -> None:
    clip_by_own_norm(patch)


@mutant(TWO)
def one_stage_does_not_clip(patch: Patch, rank: int) -> None:
    if rank == 0:
        patch.setattr(step_module, "clip", lambda _parts, norm, limit: min(1.0, limit / norm))


@mutant(TWO)
def tokens_counted_once_a_stage(patch: Patch, _rank: int) -> None:
    count_tokens_along(patch, "pp")


@mutant(SPLIT)
def loss_reported_by_every_stage(patch: Patch, _rank: int) -> None:
    original = LossScale.mean_loss
    patch.setattr(
        LossScale,
        "mean_loss",
        lambda self, total: original(self, total) * self._world.degree("pp"),
    )


@mutant(TWO)
def loss_seen_by_the_last_stage_alone(patch: Patch, _rank: int) -> None:
    patch.setattr(LossScale, "mean_loss", lambda self, total: total.item() / self.count)


@mutant(TWO)
def loss_of_the_last_micro_batch_reported(patch: Patch, _rank: int) -> None:
    original = Passes._forward

    def forward(self: Passes, *arguments: Any) -> Tensor:
        self._loss_sum.zero_()
        return original(self, *arguments)

    patch.setattr(Passes, "_forward", forward)


# Evaluations


@mutant(INTERLEAVED)
def last_micro_batch_not_evaluated(patch: Patch, _rank: int) -> None:
    original = Passes._waves

    def waves(self: Passes, num_microbatches: int) -> RankActions:
        found = original(self, num_microbatches)
        least = num_microbatches - (num_microbatches > 1)
        return tuple(tuple(a for a in own if a.microbatch < least) for own in found)

    patch.setattr(Passes, "_waves", waves)


@mutant(V)
def evaluation_of_swapped_micro_batches(patch: Patch, _rank: int) -> None:
    original = Passes._forward

    def forward(self: Passes, stage: int, microbatch: int, x: Tensor | None) -> Tensor:
        is_evaluation = not torch.is_grad_enabled()
        other = len(self._batches) - 1 - microbatch if stage % 2 else microbatch
        return original(self, stage, other if is_evaluation else microbatch, x)

    patch.setattr(Passes, "_forward", forward)


@mutant(TENSOR)
def evaluation_loss_summed_over_tensor_ranks(patch: Patch, _rank: int) -> None:
    original = Passes.evaluate
    patch.setattr(
        Passes,
        "evaluate",
        lambda self, *arguments: original(self, *arguments) * self._world.degree("tp"),
    )


# The weights


@mutant(TWO)
def freeze_ignored_on_one_stage(patch: Patch, rank: int) -> None:
    if rank == 0:
        patch.setattr(apply_module, "freeze", lambda _model, _patterns: None)


@mutant(TWO)
def frozen_layers_numbered_within_their_stage(patch: Patch, _rank: int) -> None:
    original = apply_module.keep_stages

    def keep(model: Any, cut: Any) -> None:
        original(model, cut)
        first = cut.layers[cut.own[0]].start
        model.blocks[first].ffn.requires_grad_(False)

    patch.setattr(apply_module, "keep_stages", keep)


@mutant(TWO, PACKED)
def another_momentum_on_one_stage(patch: Patch, rank: int) -> None:
    original = torch.optim.SGD.step

    def step(self: torch.optim.SGD) -> None:
        for group in self.param_groups:
            group["momentum"] -= 1e-6 * rank
        original(self)

    patch.setattr(torch.optim.SGD, "step", step)


@mutant(TWO)
def one_stage_s_first_update_skipped(patch: Patch, rank: int) -> None:
    original, calls = torch.optim.AdamW.step, count()

    def step(self: torch.optim.AdamW) -> None:
        if rank or next(calls):
            original(self)

    patch.setattr(torch.optim.AdamW, "step", step)


@mutant(TWO, PACKED)
def one_stage_moves_by_the_gradient_before(patch: Patch, rank: int) -> None:
    original = torch.optim.SGD.step
    held: dict[Any, Tensor] = {}

    def step(self: torch.optim.SGD) -> None:
        for parameter in self.param_groups[0]["params"] if rank == 0 else ():
            mine = parameter.grad
            parameter.grad = held.get(parameter, torch.zeros_like(mine))
            held[parameter] = mine
        original(self)

    patch.setattr(torch.optim.SGD, "step", step)


# With other axes


@mutant(REPLICATED)
def one_stage_s_replicas_never_reduced(patch: Patch, _rank: int) -> None:
    original = Replicated.finish_gradients

    def finish(self: Replicated, model: Any) -> None:
        if self.world.coordinate("pp") == 0:
            original(self, model)

    patch.setattr(Replicated, "finish_gradients", finish)


@mutant(REPLICATED)
def replicas_of_the_last_stage_read_the_same_data(patch: Patch, _rank: int) -> None:
    original = World.data_index.fget  # type: ignore[attr-defined]
    patch.setattr(
        World, "data_index", property(lambda self: original(self) * (1 - self.coordinate("pp")))
    )


@mutant(TENSOR)
def norms_of_one_stage_not_summed_over_tensor_ranks(patch: Patch, _rank: int) -> None:
    original = SplitDecoder.finish_gradients

    def finish(self: SplitDecoder, parts: Any, axes: Any) -> None:
        is_first = self.world.coordinate("pp") == 0
        original(replace(self, partial=frozenset()) if is_first else self, parts, axes)

    patch.setattr(SplitDecoder, "finish_gradients", finish)


@pytest.mark.parametrize("name", DEFECTS)
def test_the_certificate_fails(monkeypatch, name):
    assert_caught(monkeypatch, DEFECTS[name])
