"""The plain Llama on two ranks, one axis at a time, with what torch has for it.

Every one of these is a step of a plain training loop: forward, backward, clip, fused AdamW. They
are the peers of `paceline.bench.axes`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_, clip_grads_with_norm_, get_total_norm

from paceline.bench.plain import Attention, Llama, mean_loss, turn
from paceline.data.batch import Batch
from paceline.dist.world import World
from paceline.plan.model_spec import ModelSpec
from paceline.plan.plan import OptimizerConfig
from paceline.plan.tensor_rules import head_share

Step = Callable[[], float]
"""Takes a step and returns the loss that this rank knows, NaN where it knows none."""

UNKNOWN = float("nan")


def replicated(
    spec: ModelSpec,
    weights: Mapping[str, Tensor],
    batches: Sequence[Batch],
    world: World,  # noqa: ARG001
    config: OptimizerConfig,
) -> Step:
    """`DistributedDataParallel`: gradients are averaged in buckets, during the backward pass."""
    model = DistributedDataParallel(_loaded(Llama(spec), weights), gradient_as_bucket_view=True)
    return _whole_step(model, batches, config)


def sharded(
    spec: ModelSpec,
    weights: Mapping[str, Tensor],
    batches: Sequence[Batch],
    world: World,
    config: OptimizerConfig,
) -> Step:
    """`fully_shard`, one unit a block."""
    model = _loaded(Llama(spec), weights)
    for unit in (*model.blocks.values(), model):
        fully_shard(unit, mesh=world.device_mesh("dp_shard"))
    return _whole_step(model, batches, config)


def _whole_step(model: nn.Module, batches: Sequence[Batch], config: OptimizerConfig) -> Step:
    """The loop of a model that is called as one process would."""
    optimizer = _adamw(model.parameters(), config)

    def step() -> float:
        total = 0.0
        for batch in batches:
            loss = mean_loss(model(batch.tokens_BT), batch.labels_BT) / len(batches)
            loss.backward()
            total += loss.item()
        clip_grad_norm_(model.parameters(), config.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        return total

    return step


# Tensor parallelism


class SplitAttention(nn.Module):
    """Attention on some of the heads, with hidden states split over tokens before and after.

    SmolLM2's 9 query heads and 3 key heads go into no two equal parts, so `ColwiseParallel` would
    cut a head in two. Here a rank has 4 or 5 query heads, and the key heads that they read, one of
    which both ranks have: what ours does.
    """

    def __init__(self, spec: ModelSpec, whole: Attention, mesh: DeviceMesh) -> None:
        super().__init__()
        heads = head_share(spec.num_heads, spec.num_kv_heads, mesh.size(), mesh.get_local_rank())
        self._mesh = mesh
        self._heads = whole.heads
        self._key_of_query = list(heads.key_of_query)
        size = spec.head_dim
        self.query_rows = slice(heads.query.start * size, heads.query.stop * size)
        self.key_rows = slice(heads.key.start * size, heads.key.stop * size)
        self.num_owned_rows = len(heads.owned_key) * size
        self.query = nn.Parameter(whole.query.weight.detach()[self.query_rows].clone())
        self.key = nn.Parameter(whole.key.weight.detach()[self.key_rows].clone())
        self.value = nn.Parameter(whole.value.weight.detach()[self.key_rows].clone())
        self.output = nn.Parameter(whole.output.weight.detach()[:, self.query_rows].clone())

    def forward(self, x_BTD: DTensor, cos_TH: Tensor, sin_TH: Tensor) -> Tensor:
        whole = x_BTD.redistribute(placements=[Replicate()])
        x = whole.to_local(grad_placements=[Partial()])
        matrices = (self.query, self.key, self.value)
        q_BNTH, k_BKTH, v_BKTH = (self._heads(functional.linear(x, w)) for w in matrices)
        k_BKTH = turn(k_BKTH, cos_TH, sin_TH)
        out_BNTH = functional.scaled_dot_product_attention(
            turn(q_BNTH, cos_TH, sin_TH),
            k_BKTH[:, self._key_of_query],
            v_BKTH[:, self._key_of_query],
            is_causal=True,
        )
        y_BTD = functional.linear(out_BNTH.transpose(1, 2).flatten(2), self.output)
        partial = DTensor.from_local(y_BTD, self._mesh, [Partial()], run_check=False)
        return partial.redistribute(placements=[Shard(1)]).to_local()


class SplitLlama(Llama):
    """The model whose last norm gives rows of the tokens, and whose embedding has rows of words."""

    def predict(self, x_BTD: Tensor) -> Tensor:
        normed = cast("DTensor", self.norm(x_BTD)).redistribute(placements=[Replicate()])
        return functional.linear(normed, self.embedding.weight)


def split(
    spec: ModelSpec,
    weights: Mapping[str, Tensor],
    batches: Sequence[Batch],
    world: World,
    config: OptimizerConfig,
) -> Step:
    """`parallelize_module` with sequence parallelism, and attention as `SplitAttention` has it."""
    mesh = world.device_mesh("tp")
    model = _loaded(SplitLlama(spec), weights)
    for block in model.blocks.values():
        block.attention = SplitAttention(spec, cast("Attention", block.attention), mesh)
    parallelize_module(model, mesh, _tensor_plan(model))
    state = _LocalState(model, config)

    def step() -> float:
        total = 0.0
        for batch in batches:
            with loss_parallel():
                loss = mean_loss(model(batch.tokens_BT), batch.labels_BT) / len(batches)
                loss.backward()
            total += cast("DTensor", loss).full_tensor().item()
        state.update(world.rank)
        return total

    return step


def _tensor_plan(model: Llama) -> dict[str, ParallelStyle]:
    rows, whole = Shard(1), Replicate()
    of_block: dict[str, ParallelStyle] = {
        "attention_norm": SequenceParallel(),
        "ffn_norm": SequenceParallel(),
        "ffn": PrepareModuleInput(input_layouts=rows, desired_input_layouts=whole),
        "ffn.gate": ColwiseParallel(),
        "ffn.up": ColwiseParallel(),
        "ffn.down": RowwiseParallel(output_layouts=rows),
    }
    ends: dict[str, ParallelStyle] = {
        "embedding": RowwiseParallel(input_layouts=whole, output_layouts=rows),
        "norm": SequenceParallel(),
    }
    blocks = {f"blocks.{n}.{name}": how for n in model.blocks for name, how in of_block.items()}
    return ends | blocks


class _LocalState:
    """What a rank moves of a split model: the local tensors, as plain ones.

    Gradients of norms, and of key heads that both ranks have, are terms of a sum over ranks.
    """

    def __init__(self, model: Llama, config: OptimizerConfig) -> None:
        self._parameters = dict(model.named_parameters())
        self._local = {name: _local(p.detach()) for name, p in self._parameters.items()}
        self._optimizer = _adamw(self._local.values(), config)
        self._max_norm = config.clip_norm
        self._norms = [name for name in self._local if "norm" in name]
        attentions = {
            f"{name}.{leaf}": module
            for name, module in model.named_modules()
            if isinstance(module, SplitAttention)
            for leaf in ("key", "value")
        }
        self._keys = attentions
        self._num_key_rows = model.spec.d_kv

    def update(self, rank: int) -> None:
        """Sums gradients, clips them and takes the optimizer's step."""
        for name, parameter in self._parameters.items():
            assert parameter.grad is not None
            self._local[name].grad = _local(parameter.grad)
            parameter.grad = None
        self._sum_terms()
        norm = _norm_over_ranks([self._owned(name, rank) for name in self._local])
        clip_grads_with_norm_(self._local.values(), self._max_norm, norm)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def _sum_terms(self) -> None:
        terms = [self._gradient(name) for name in self._norms]
        for name, attention in self._keys.items():
            gradient = self._gradient(name)
            whole = gradient.new_zeros(self._num_key_rows, gradient.shape[1])
            whole[attention.key_rows] = gradient
            terms.append(whole)
        flat = torch.cat([term.flatten() for term in terms])
        torch.distributed.all_reduce(flat)
        sums = [
            total.view_as(term)
            for total, term in zip(flat.split([t.numel() for t in terms]), terms, strict=True)
        ]
        for name, total in zip(self._norms, sums, strict=False):
            self._local[name].grad = total
        for (name, attention), total in zip(
            self._keys.items(), sums[len(self._norms) :], strict=True
        ):
            self._local[name].grad = total[attention.key_rows]

    def _owned(self, name: str, rank: int) -> Tensor:
        """The part of a gradient that this rank counts for the norm of all."""
        gradient = self._gradient(name)
        if name in self._keys:
            return gradient[gradient.shape[0] - self._keys[name].num_owned_rows :]
        return gradient if rank == 0 or name not in self._norms else gradient[:0]

    def _gradient(self, name: str) -> Tensor:
        gradient = self._local[name].grad
        assert gradient is not None
        return gradient


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


# Pipelines


def piped(
    spec: ModelSpec,
    weights: Mapping[str, Tensor],
    batches: Sequence[Batch],
    world: World,
    config: OptimizerConfig,
    *,
    layers: Sequence[range],
) -> Step:
    """`PipelineStage` under `Schedule1F1B`; the tied matrix's two gradients are summed."""
    model = _loaded(Llama(spec, layers[world.rank]), weights)
    stage = PipelineStage(model, world.rank, len(layers), world.device)
    schedule = Schedule1F1B(stage, len(batches), loss_fn=mean_loss)
    optimizer = _adamw(model.parameters(), config)
    tokens = torch.cat([batch.tokens_BT for batch in batches])
    labels = torch.cat([batch.labels_BT for batch in batches])

    def step() -> float:
        losses: list[Tensor] = []
        if model.is_first:
            schedule.step(tokens)
        else:
            schedule.step(target=labels, losses=losses)
        tied = model.embedding.weight.grad
        torch.distributed.all_reduce(tied)
        counted = [p.grad for p in model.parameters() if model.is_first or p.grad is not tied]
        norm = _norm_over_ranks([gradient for gradient in counted if gradient is not None])
        clip_grads_with_norm_(model.parameters(), config.clip_norm, norm)
        optimizer.step()
        optimizer.zero_grad()
        return torch.stack(losses).mean().item() if losses else UNKNOWN

    return step


def _norm_over_ranks(own: list[Tensor]) -> Tensor:
    """The norm of all ranks' gradients together."""
    squares = get_total_norm(own).square()
    torch.distributed.all_reduce(squares)
    return squares.sqrt()


def _loaded(model: Llama, weights: Mapping[str, Tensor]) -> Llama:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    return model


def _adamw(parameters: object, config: OptimizerConfig) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        list(cast("Sequence[Tensor]", parameters)),
        lr=config.lr,
        betas=(config.betas[0], config.betas[1]),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )
