"""Deliberate defects in the training of data ranks, each of which `certify` catches.

All of them are of kinds that a loss curve hides.
"""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mutation import (
    PACKED,
    PADDED,
    SPEC,
    Defects,
    Patch,
    assert_caught,
    certify_with,
    nothing,
    plan_of,
)
from torch.distributed.fsdp import FSDPModule

from paceline.data.batch import IGNORED, Batch
from paceline.data.loader import Loader
from paceline.data.rows import DocumentRows, PackedRows
from paceline.dist.world import World
from paceline.kernels import cross_entropy
from paceline.models.layout import Layout
from paceline.models.tied import TiedEmbedding
from paceline.optim import adamw, sgd
from paceline.optim.scale import LossScale, clip
from paceline.parallel import apply as apply_module
from paceline.parallel import buckets
from paceline.parallel.data.fully_sharded import FullySharded
from paceline.parallel.data.replicated import Replicated
from paceline.parallel.pipeline.passes import Passes
from paceline.plan.plan import Plan
from paceline.train import evaluate as evaluate_module
from paceline.train import step as step_module
from paceline.verify import certify as certify_module

pytestmark = [pytest.mark.cpu, pytest.mark.ranks]

REPLICATED = plan_of(dp_replicate=2)
SHARDED = plan_of(dp_shard=2)
HYBRID = plan_of(dp_replicate=2, dp_shard=2)

DEFECTS = Defects(SPEC)
mutant = DEFECTS.of


@pytest.mark.parametrize("plan", [REPLICATED, SHARDED, HYBRID], ids=lambda plan: str(plan.mesh))
def test_without_a_defect_the_same_path_is_certified(monkeypatch, plan):
    certificate = certify_with(monkeypatch, plan, SPEC, nothing, PACKED, PADDED)
    assert certificate.certified, certificate.worst


# The scale of losses and gradients


@mutant(REPLICATED, PACKED)
def gradients_averaged_over_ranks(patch: Patch, _rank: int) -> None:
    original = Replicated.finish_gradients

    def finish(self: Replicated, model: Any) -> None:
        original(self, model)
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad /= 2

    patch.setattr(Replicated, "finish_gradients", finish)


@mutant(REPLICATED)
def all_reduce_dropped(patch: Patch, _rank: int) -> None:
    patch.setattr(Replicated, "finish_gradients", lambda _self, _model: None)


@mutant(REPLICATED)
def last_bucket_not_reduced(patch: Patch, _rank: int) -> None:
    original = buckets.buckets
    patch.setattr(buckets, "BUCKET_BYTES", 4096)
    patch.setattr(buckets, "buckets", lambda gradients: list(original(gradients))[:-1])


@mutant(SHARDED)
def divide_factor_left_at_its_default(patch: Patch, _rank: int) -> None:
    patch.setattr(FSDPModule, "set_gradient_divide_factor", lambda _self, _factor: None)


@mutant(HYBRID)
def replicas_of_shards_never_reduced(patch: Patch, _rank: int) -> None:
    original = FullySharded.wrap

    def wrap(self: FullySharded, model: Any) -> None:
        world = self.world
        alone = replace(world.mesh, dp_replicate=1)
        self.world = SimpleNamespace(  # type: ignore[assignment]
            mesh=alone,
            device=world.device,
            device_mesh=world.device_mesh,
            traffic=world.traffic,
        )
        original(self, model)
        self.world = world

    patch.setattr(FullySharded, "wrap", wrap)


@mutant(REPLICATED)
def loss_divided_by_the_local_count(patch: Patch, _rank: int) -> None:
    original = LossScale.__init__

    def init(self: LossScale, local_count: int, world: World) -> None:
        original(self, local_count, world)
        self.count = 2 * local_count  # right, were the counts equal

    patch.setattr(LossScale, "__init__", init)


@mutant(SHARDED)
def padding_counted_as_tokens(patch: Patch, _rank: int) -> None:
    patch.setattr(Batch, "count", property(lambda self: self.labels_BT.numel()))


@mutant(REPLICATED)
def loss_of_one_rank_reported(patch: Patch, _rank: int) -> None:
    patch.setattr(LossScale, "mean_loss", lambda self, total: 2 * total.item() / self.count)


@mutant(REPLICATED)
def loss_reported_as_nan(patch: Patch, _rank: int) -> None:
    patch.setattr(LossScale, "mean_loss", lambda _self, _total: math.nan)


@mutant(REPLICATED)
def tokens_of_one_rank_reported(patch: Patch, _rank: int) -> None:
    original = certify_module.compute_gradients

    def compute(state: Any, batches: Any, *rest: Any, **options: Any) -> Any:
        result = original(state, batches, *rest, **options)
        return replace(result, valid_tokens=sum(batch.count for batch in batches))

    patch.setattr(certify_module, "compute_gradients", compute)


# Evaluations


@mutant(REPLICATED)
def evaluation_on_one_rank_s_tokens(patch: Patch, _rank: int) -> None:
    patch.setattr(evaluate_module, "DATA_AXES", ())


@mutant(SHARDED)
def evaluation_that_leaves_gradients(patch: Patch, _rank: int) -> None:
    def evaluate(self: Passes, batches: Any, objective: Any) -> torch.Tensor:
        with torch.enable_grad():
            return self.train(batches, objective, lambda loss: loss)

    patch.setattr(Passes, "evaluate", evaluate)


# The clip


@mutant(SHARDED, PACKED)
def clip_applied_twice(patch: Patch, _rank: int) -> None:
    def twice(parameters: Any, norm: float, max_norm: float) -> float:
        clip(parameters, norm, max_norm)
        return clip(parameters, norm, max_norm)

    patch.setattr(step_module, "clip", twice)


@mutant(SHARDED)
def clip_computed_and_not_applied(patch: Patch, _rank: int) -> None:
    patch.setattr(step_module, "clip", lambda _parameters, norm, limit: min(1.0, limit / norm))


@mutant(SHARDED)
def norm_of_one_rank_s_part(patch: Patch, _rank: int) -> None:
    patch.setattr(FullySharded, "spread_axes", ())


@mutant(REPLICATED)
def norm_before_the_reduction(patch: Patch, _rank: int) -> None:
    original = Replicated.finish_gradients
    pending: list[Any] = []
    patch.setattr(Replicated, "finish_gradients", lambda self, model: pending.append((self, model)))

    def late_clip(parameters: Any, norm: float, max_norm: float) -> float:
        original(*pending.pop())
        return clip(parameters, norm, max_norm)

    patch.setattr(step_module, "clip", late_clip)


# Accumulation


@mutant(REPLICATED)
def a_micro_batch_skipped(patch: Patch, _rank: int) -> None:
    original = certify_module.compute_gradients
    patch.setattr(
        certify_module,
        "compute_gradients",
        lambda state, batches, *rest, **options: original(state, batches[:-1], *rest, **options),
    )


@mutant(SHARDED)
def the_last_micro_batch_s_gradient_alone(patch: Patch, _rank: int) -> None:
    original = certify_module.next_token

    def forgetful(model: Any, batch: Batch) -> Any:
        model.zero_grad()
        return original(model, batch)

    patch.setattr(certify_module, "next_token", forgetful)


@mutant(REPLICATED)
def gradients_kept_from_step_to_step(patch: Patch, _rank: int) -> None:
    patch.setattr(torch.optim.Optimizer, "zero_grad", lambda _self: None)


# Parameters


@mutant(SHARDED)
def frozen_layer_trained(patch: Patch, _rank: int) -> None:
    patch.setattr(apply_module, "freeze", lambda _model, _patterns: None)


@mutant(SHARDED)
def frozen_layer_decayed(patch: Patch, _rank: int) -> None:
    original = torch.optim.Optimizer.zero_grad
    frozen: list[Any] = []
    freeze = apply_module.freeze

    def remember(model: Any, patterns: Any) -> None:
        freeze(model, patterns)
        frozen.append(model)

    def decay(self: Any) -> None:
        with torch.no_grad():
            for parameter in frozen[-1].parameters():
                if not parameter.requires_grad:
                    parameter.mul_(1 - 1e-9)
        original(self)

    patch.setattr(apply_module, "freeze", remember)
    patch.setattr(torch.optim.Optimizer, "zero_grad", decay)


@mutant(REPLICATED, PACKED)
def first_feed_forward_trained_at_another_rate(patch: Patch, _rank: int) -> None:
    """It is the layer that is frozen in the other case."""
    original = certify_module.compute_gradients

    def compute(state: Any, *arguments: Any, **options: Any) -> Any:
        result = original(state, *arguments, **options)
        gradient = state.model.parts["blocks.0.ffn.down.weight"].gradient
        gradient *= 1 + 1e-9
        return result

    patch.setattr(certify_module, "compute_gradients", compute)


@mutant(REPLICATED)
def tied_head_s_gradient_dropped(patch: Patch, _rank: int) -> None:
    patch.setattr(TiedEmbedding, "keep", lambda *_: None)


@mutant(REPLICATED)
def tied_embedding_s_rows_put_in_place_of_the_head_s(patch: Patch, _rank: int) -> None:
    original = TiedEmbedding.take

    def take(self: TiedEmbedding) -> torch.Tensor | None:
        gradient = original(self)
        return None if gradient is None else torch.zeros_like(gradient)

    patch.setattr(TiedEmbedding, "take", take)


@mutant(REPLICATED)
def loss_s_last_chunk_without_a_gradient(patch: Patch, _rank: int) -> None:
    original = cross_entropy._chunk

    def chunk(
        logits_CV: torch.Tensor, labels_C: torch.Tensor, wide: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        loss, gradient = original(logits_CV, labels_C, wide)
        gradient[-1] = 0
        return loss, gradient

    patch.setattr(cross_entropy, "_chunk", chunk)


@mutant(REPLICATED)
def one_rank_starts_a_little_aside(patch: Patch, rank: int) -> None:
    original = Replicated.put

    def put(self: Replicated, name: str, parameter: Any, value: torch.Tensor) -> None:
        original(self, name, parameter, value.double() * (1 + rank * 1e-10))

    patch.setattr(Replicated, "put", put)


@mutant(SHARDED)
def gradients_reduced_in_float32(patch: Patch, _rank: int) -> None:
    patch.setattr(FullySharded, "reduce_dtype", torch.float32)


# The optimizers


@mutant(REPLICATED)
def vectors_decayed(patch: Patch, _rank: int) -> None:
    def one_group(parameters: Any, config: Any) -> list[dict[str, Any]]:
        trained = [p for p in parameters if p.requires_grad]
        return [{"params": trained, "weight_decay": config.weight_decay}]

    patch.setattr(adamw, "parameter_groups", one_group)
    patch.setattr(sgd, "parameter_groups", one_group)


@mutant(REPLICATED, PACKED)
def nothing_decayed(patch: Patch, _rank: int) -> None:
    original = adamw.parameter_groups

    def without(model: Any, config: Any) -> list[dict[str, Any]]:
        return original(model, replace(config, weight_decay=0.0))

    patch.setattr(adamw, "parameter_groups", without)
    patch.setattr(sgd, "parameter_groups", without)


@mutant(REPLICATED)
def learning_rate_of_the_next_step(patch: Patch, _rank: int) -> None:
    original = certify_module.learning_rate
    patch.setattr(
        certify_module,
        "learning_rate",
        lambda config, step, total: original(config, step + 1, total),
    )


@mutant(SHARDED, PACKED)
def one_rank_s_update_skipped(patch: Patch, rank: int) -> None:
    if rank == 1:
        for optimizer in (torch.optim.AdamW, torch.optim.SGD):
            patch.setattr(optimizer, "step", lambda _self: None)


# Data


@mutant(SHARDED, PACKED)
def document_mask_leaked(patch: Patch, _rank: int) -> None:
    patch.setattr(Layout, "mask_B1TT", lambda _self, _window=None: None)


@mutant(REPLICATED, PACKED)
def labels_across_documents(patch: Patch, _rank: int) -> None:
    original = PackedRows.__getitem__

    def crossing(self: PackedRows, index: int) -> Any:
        row = original(self, index)
        start = index * self._length
        following = self._store.tokens[start + 1 : start + self._length + 1]
        return row._replace(labels_T=following.astype(row.labels_T.dtype))

    patch.setattr(PackedRows, "__getitem__", crossing)


@mutant(REPLICATED)
def padding_trained_on(patch: Patch, _rank: int) -> None:
    original = DocumentRows.__getitem__

    def padded(self: DocumentRows, index: int) -> Any:
        row = original(self, index)
        return row._replace(labels_T=row.labels_T.clip(min=0))

    assert IGNORED < 0
    patch.setattr(DocumentRows, "__getitem__", padded)


@mutant(SHARDED)
def one_rank_a_step_ahead(patch: Patch, rank: int) -> None:
    original = Loader.microbatches
    patch.setattr(
        Loader, "microbatches", lambda self, step, index: original(self, step + rank, index)
    )


@mutant(REPLICATED)
def both_ranks_on_the_same_data(patch: Patch, _rank: int) -> None:
    patch.setattr(World, "data_index", property(lambda _self: 0))


@mutant(REPLICATED)
def another_shuffle_on_one_rank(patch: Patch, rank: int) -> None:
    original = Loader.__init__

    def init(self: Loader, store: Any, plan: Plan, *, end_token: int) -> None:
        train = replace(plan.train, seed=plan.train.seed + rank)
        original(self, store, replace(plan, train=train), end_token=end_token)

    patch.setattr(Loader, "__init__", init)


@pytest.mark.parametrize("name", DEFECTS)
def test_the_certificate_fails(monkeypatch, name):
    assert_caught(monkeypatch, DEFECTS[name])
