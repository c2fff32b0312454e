"""Bugs that others have published: our run of the configuration is right, and the bug is caught.

Each entry is named after what went wrong, and says in whose thread it was observed and how. Its
plan is the configuration; it is certified as it is, and then with the bug put in.

Out of scope, since they need axes or parts that are not built:

- pytorch/pytorch#160285: gradients of the wrong size under expert parallelism.
- NVIDIA/Megatron-LM#5916: norm undercounted under expert and tensor parallelism.
- NVIDIA/Megatron-LM#7165: gradients of experts 8.4 times outside of their band.
- deepspeedai/DeepSpeed#8475, #8478: norms of different experts averaged, or counted twice.
- NVIDIA/Megatron-LM#673, #906: losses scaled by the number of context ranks.
- NVIDIA/Megatron-LM#1464: gradients of attention off by up to 1.2 under context parallelism.
- NVIDIA/Megatron-LM#1528: norms' gradients tp times too large with context ranks and FP8.
- NVIDIA-NeMo/Megatron-Bridge#4974: context ranks trained on gradients without a scale.
- pytorch/torchtitan#3111: largest loss too small by the number of context ranks.
- NVIDIA/Megatron-LM#7452, #1532: losses of several tokens ahead, of which the gradients exploded.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from mutation import (
    PACKED,
    PADDED,
    UNEVEN,
    Defects,
    Patch,
    assert_caught,
    certify_with,
    leave_out,
    nothing,
    plan_of,
)
from torch import Tensor

from paceline.dist.world import World
from paceline.models.attention import Attention
from paceline.models.families.mixtral import PRESETS as MIXTRAL
from paceline.models.tied import TiedEmbedding
from paceline.optim.scale import LossScale
from paceline.parallel import apply as apply_module
from paceline.parallel.apply import ParallelModel
from paceline.parallel.pipeline.base import Action, Kind
from paceline.parallel.pipeline.passes import EMBEDDING, Passes
from paceline.parallel.pipeline.runtime import Runtime
from paceline.parallel.tensor import boundary, decoder
from paceline.parallel.tensor.boundary import copy_in, gather_rows, sum_up
from paceline.parallel.tensor.vocabulary import SplitVocabulary, as_tokens
from paceline.plan.layout import Box, Place
from paceline.plan.model_spec import ModelSpec
from paceline.plan.plan import Plan, ZeroConfig
from paceline.verify.certify import Certificate

pytestmark = [pytest.mark.cpu, pytest.mark.ranks]

ONE_KEY_HEAD = replace(UNEVEN, num_kv_heads=1)
EXPERTS = replace(MIXTRAL["tiny"], num_layers=1)  # its only layer is trained where all are packed

STAGES = plan_of(pp=2, sequences=3)
STAGES_OF_REPLICAS = plan_of(pp=2, dp_replicate=2, sequences=6)
REPLICAS = plan_of(tp=2, dp_replicate=2, length=17, sequences=6)
HYBRID = plan_of(dp_replicate=2, dp_shard=2)
ROWS = plan_of(tp=2, length=17, sequences=3)
WHOLE = plan_of(tp=2, length=17, sequences=3, sequence_parallel=False)

BUGS = Defects(UNEVEN)
bug = BUGS.of


# The scale of the loss


@bug(STAGES)
def backward_runs_on_the_sum_of_losses(patch: Patch, _rank: int) -> None:
    """pytorch/torchtitan#2972, again in #4194: in a pipeline the loss was divided by the number of
    valid tokens after the backward pass, so that gradients were as many times too large.
    """
    patch.setattr(LossScale, "scaled", lambda _self, loss_sum: loss_sum)


@bug(STAGES)
def micro_batches_weigh_the_same(patch: Patch, _rank: int) -> None:
    """pytorch/torchtitan#1842: every micro-batch's loss was a mean of its own, so that a token
    counted more the fewer there were beside it.
    """
    original = Passes._forward

    def forward(self: Passes, stage: int, microbatch: int, x: Tensor | None) -> Tensor:
        size = self._batches[microbatch].count * len(self._batches)
        self._scaled = lambda loss: loss / size
        return original(self, stage, microbatch, x)

    patch.setattr(Passes, "_forward", forward)


@bug(REPLICAS)
def ranks_weigh_the_same(patch: Patch, _rank: int) -> None:
    """huggingface/transformers#34242: tokens were counted on each rank alone, and gradients
    averaged over ranks.
    """
    original = LossScale.__init__

    def init(self: LossScale, local_count: int, world: World) -> None:
        original(self, local_count, world)
        self.count = local_count * world.mesh.num_data_ranks

    patch.setattr(LossScale, "__init__", init)


@bug(STAGES)
def micro_batches_summed_where_a_mean_was_meant(patch: Patch, _rank: int) -> None:
    """deepspeedai/DeepSpeed#7773: the norm of a pipeline's gradients was as many times too large as
    there were micro-batches.
    """
    original = LossScale.scaled
    patch.setattr(LossScale, "scaled", lambda self, loss: 3 * original(self, loss))


@bug(STAGES)
def accumulated_gradients_scaled_at_every_micro_batch(patch: Patch, _rank: int) -> None:
    """pytorch/torchtitan#1733, mended in #1732: a pipeline divided all that was in the gradients at
    each round of accumulation, which made an exponential moving average of the sum.
    """
    original = Runtime._backward

    def backward(self: Runtime, action: Action) -> None:
        original(self, action)
        passes = self._stage_forward.__self__  # type: ignore[attr-defined]
        for parameter in passes._models[action.stage]._model.parameters():
            if parameter.grad is not None:
                parameter.grad /= 2

    patch.setattr(Runtime, "_backward", backward)


@bug(STAGES)
def scale_applied_at_every_stage(patch: Patch, _rank: int) -> None:
    """deepspeedai/DeepSpeed#8152, mended in #8154: every stage divided what it was given by the
    number of micro-batches, so that with 8 of them the first of two stages had 1 / 64.
    """
    original = Runtime._leave

    def leave(self: Runtime, send: Action, tensor: Tensor) -> None:
        original(self, send, tensor / 3 if send.kind is Kind.SEND_BACKWARD else tensor)

    patch.setattr(Runtime, "_leave", leave)


@bug(HYBRID)
def gradients_averaged_over_replicas_too(patch: Patch, _rank: int) -> None:
    """pytorch/torchtitan#2318: once losses were divided by the tokens of all ranks, replicas went
    on to average, and the norm was off by their number, 8.
    """
    original = ParallelModel.finish_gradients

    def finish(self: ParallelModel) -> None:
        original(self)
        for part in self.parts.values():
            if part.gradient is not None:
                part.gradient.div_(self.data.world.degree("dp_replicate"))

    patch.setattr(ParallelModel, "finish_gradients", finish)


# The norm


@bug(STAGES)
def norm_of_one_stage(patch: Patch, _rank: int) -> None:
    """pytorch/torchtitan#596, Modalities/modalities#313: each stage clipped by the norm of its own
    gradients.
    """
    patch.setattr(ParallelModel, "spread_axes", ("tp",))


@bug(ROWS)
def norm_of_one_tensor_rank(patch: Patch, _rank: int) -> None:
    """meta-pytorch/torchtune#2420, pytorch/pytorch#170862: the norm was that of the local parts."""
    patch.setattr(ParallelModel, "spread_axes", ("pp",))


@bug(HYBRID)
def norm_summed_over_replicas(patch: Patch, _rank: int) -> None:
    """ByteDance-Seed/VeOmni#184: squares were summed over replicas as well as over shards."""
    original = ParallelModel.spread_axes.fget  # type: ignore[attr-defined]
    patch.setattr(
        ParallelModel, "spread_axes", property(lambda self: ("dp_replicate", *original(self)))
    )


@bug(WHOLE)
def whole_parameters_counted_on_every_rank(patch: Patch, _rank: int) -> None:
    """ROCm/TransformerEngine#715: weights that all tensor ranks have were counted by each of them,
    and the norm was 1.36 to 1.52 times too large.
    """
    patch.setattr(Place, "disowned", lambda self: self)


@bug(STAGES)
def tied_matrix_counted_on_both_stages(patch: Patch, _rank: int) -> None:
    """deepspeedai/DeepSpeed#1252: parameters that several stages have were counted several times.

    Here the head alone stands for both.
    """
    patch.setattr(Place, "disowned", lambda self: self)


@bug(ROWS)
def a_parameter_split_by_heads_counted_on_one_rank(patch: Patch, _rank: int) -> None:
    """NVIDIA/Megatron-LM#7452, finding 8: the offsets of attention sinks are split by heads, but
    all ranks' but one's were left out of the norm. The nearest that we have is a bias of queries.
    """
    original = apply_module.split

    def split(*arguments: Any, **options: Any) -> Any:
        found = original(*arguments, **options)
        places = dict(found.places)
        for name, place in places.items():
            if name.endswith(".query.bias") and place.box.offsets != (0,):
                places[name] = replace(place, owned=Box(place.box.offsets, (0,)))
        return replace(found, places=places)

    patch.setattr(apply_module, "split", split)


# What all tensor ranks have


@bug(ROWS)
def gradient_of_the_last_norm_not_summed(patch: Patch, _rank: int) -> None:
    """NVIDIA/Megatron-LM#1446: with sequence parallelism the last norm's gradient differed from
    rank to rank.
    """
    leave_out(patch, "partial", lambda name: name == "norm.weight")


@bug(ROWS)
def gradients_of_norms_not_summed(patch: Patch, _rank: int) -> None:
    """EleutherAI/gpt-neox#1257: before norms' gradients were summed, training with sequence
    parallelism ran and its loss ended at about 8.
    """
    leave_out(patch, "partial", lambda name: name.endswith("norm.weight"))


@bug(WHOLE)
def gradients_of_norms_of_heads_not_summed(patch: Patch, _rank: int) -> None:
    """NVIDIA-NeMo/RL#3716: a train step of its own left out the sum over tensor ranks of the
    gradients of norms of queries and keys.
    """
    leave_out(patch, "partial", lambda name: "query_norm" in name or "key_norm" in name)


@bug(ROWS, PACKED, spec=EXPERTS)
def gradients_behind_experts_not_summed(patch: Patch, _rank: int) -> None:
    """pytorch/torchtitan#1805, mended in #1878: on tensor ranks a sum was missing in the backward
    pass through experts.
    """
    leave_out(patch, "partial", lambda name: ".experts." in name or ".router." in name)


@bug(WHOLE, PACKED, spec=ONE_KEY_HEAD)
def gradient_through_a_copied_key_head_not_summed(patch: Patch, _rank: int) -> None:
    """bigcode-project/Megatron-LM#35: with one key head on all ranks, the gradient for what its
    projection is given was each rank's own; the loss exploded after thousands of steps.
    """
    inputs: list[Tensor] = []

    def enter(_attention: Any, given: Any, *, world: World, is_sequence_parallel: bool) -> Any:
        assert not is_sequence_parallel
        inputs.append(given[0])
        return copy_in(given[0], world), *given[1:]

    def projected(self: Attention, x_BTD: Tensor) -> tuple[Tensor, ...]:
        own = inputs.pop()
        return self.query(x_BTD), self.key(own), self.value(own)

    patch.setattr(decoder, "_enter_attention", enter)
    patch.setattr(Attention, "_projected", projected)


@bug(WHOLE, spec=ONE_KEY_HEAD)
def gradients_of_a_copied_key_head_s_biases_not_summed(patch: Patch, _rank: int) -> None:
    """bigcode-project/Megatron-LM#11: of one key head on all ranks the weights' gradients were
    summed and the biases' were not.
    """
    leave_out(patch, "copied", lambda name: name.endswith(".bias"))


# What goes through boundaries


@bug(WHOLE)
def head_given_terms_for_a_sum(patch: Patch, _rank: int) -> None:
    """pytorch/torchtitan#3412: with a loss in chunks over split words, each rank's term of the
    gradient passed for the whole; the loss ended well above one GPU's.
    """
    patch.setattr(SplitVocabulary, "collect", lambda _self, x_BTD, _layout: x_BTD)


@bug(WHOLE)
def sum_of_a_copy_thrown_away(patch: Patch, _rank: int) -> None:
    """NovaSky-AI/SkyRL#1886: of a gradient that was not contiguous a copy was summed, and the
    gradient itself was handed on.
    """

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.world.sum(grad.clone(), ("tp",), purpose="defect")
        return grad, None

    patch.setattr(boundary._CopyIn, "backward", staticmethod(backward))


@bug(ROWS)
def gathered_rows_have_whole_gradients_summed(patch: Patch, _rank: int) -> None:
    """THUDM/slime#1748: behind gathered rows all ranks computed the same, and the backward pass
    summed their equal gradients, tp times too large for each layer.
    """

    def collect(self: SplitVocabulary, x_1RD: Tensor, layout: Any) -> Tensor:
        return copy_in(as_tokens(gather_rows(x_1RD, self._world), layout), self._world)

    patch.setattr(SplitVocabulary, "collect", collect)


@bug(WHOLE)
def bias_added_before_the_sum(patch: Patch, _rank: int) -> None:
    """huggingface/text-generation-inference#1036, Wenyueh/MinivLLM#80: the sum over ranks had the
    bias tp times.
    """

    def sum_behind(linear: Any, world: World, _is_sequence_parallel: bool) -> None:
        multiply = linear.product
        linear.product = lambda x, weight, bias: sum_up(multiply(x, weight, bias), world)

    patch.setattr(decoder, "_sum_behind", sum_behind)


@bug(WHOLE)
def bias_shared_out_before_the_sum(patch: Patch, _rank: int) -> None:
    """pytorch/torchtitan#4332: each rank added its tp-th of the bias, whose gradient then was too
    small by as much, the same on every rank.
    """

    def sum_behind(linear: Any, world: World, _is_sequence_parallel: bool) -> None:
        multiply = linear.product

        def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            share = None if bias is None else bias / world.degree("tp")
            return sum_up(multiply(x, weight, share), world)

        linear.product = product

    patch.setattr(decoder, "_sum_behind", sum_behind)


# One matrix as embedding and head


@bug(STAGES)
def ends_of_a_pipeline_come_apart(patch: Patch, _rank: int) -> None:
    """NVIDIA/Megatron-LM#656, uw-syfi/piper#13: embedding and head were two copies whose gradients
    nobody added, and which became different matrices as training went on.
    """
    patch.setattr(Passes, "finish_gradients", lambda _self, _parts: None)


@bug(ROWS)
def head_keeps_a_copy_of_its_own(patch: Patch, _rank: int) -> None:
    """NVIDIA-NeMo/RL#227: on tensor ranks the head was no longer the embedding but had its start
    values.
    """
    held: list[Tensor] = []

    def head(self: TiedEmbedding) -> Tensor:
        if not held:
            held.append(self._weight_VD.detach().clone())
        return held[0]

    patch.setattr(TiedEmbedding, "head", head)


@bug(STAGES_OF_REPLICAS)
def ends_summed_where_replicas_had_parts(patch: Patch, rank: int) -> None:
    """NVIDIA/Megatron-LM#844: gradients were scattered over data ranks before embedding and head
    were added, and these lay with different ranks: a sum met one rank's own gradient.
    """
    original = ParallelModel.finish_gradients
    is_owner = rank in (1, 2)  # the second replica of the first stage, the first of the last

    def finish(self: ParallelModel) -> None:
        own = self.module.embedding.weight.grad
        assert own is not None
        own = own.clone()
        add = self.passes.finish_gradients
        self.passes.finish_gradients = lambda _parts: None  # type: ignore[method-assign]
        original(self)
        self.passes.finish_gradients = add  # type: ignore[method-assign]
        if not is_owner:
            self.parts[EMBEDDING].ensured_gradient().copy_(own)
        add(self.parts)

    patch.setattr(ParallelModel, "finish_gradients", finish)


@cache
def ours(plan: Plan, spec: ModelSpec, case: str) -> Certificate:
    """Without a bug; several bugs have one configuration."""
    with pytest.MonkeyPatch.context() as patch:
        return certify_with(patch, plan, spec, nothing, case)


@pytest.mark.parametrize("name", BUGS)
def test_our_run_is_right_and_the_bug_is_caught(monkeypatch, name):
    defect = BUGS[name]
    assert re.match(r"[\w.-]+/[\w.-]+#\d+[,:]", defect.mutate.__doc__ or ""), "whose bug is it?"
    certificate = ours(defect.plan, defect.spec, defect.case)
    assert certificate.certified, certificate.worst
    assert_caught(monkeypatch, defect)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_ends_of_a_pipeline_are_one_matrix_whatever_the_data_ranks_share(monkeypatch, stage):
    """The configuration of NVIDIA/Megatron-LM#844, whose optimizer was split over data ranks."""
    plan = plan_of(pp=2, dp_shard=2, sequences=6, zero=ZeroConfig(stage=stage))
    certificate = certify_with(monkeypatch, plan, UNEVEN, nothing, PADDED)
    assert certificate.certified, certificate.worst


def test_ends_of_a_pipeline_are_one_matrix_on_tensor_ranks_and_replicas(monkeypatch):
    """The configuration of NVIDIA-NeMo/RL#227, in a pipeline."""
    plan = plan_of(pp=2, tp=2, dp_replicate=2, length=17, sequences=6)
    certificate = certify_with(monkeypatch, plan, UNEVEN, nothing, PADDED)
    assert certificate.certified, certificate.worst
