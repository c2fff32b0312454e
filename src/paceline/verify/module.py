"""Certification of a user's module: what `paceline.parallelize` computes against one process.

Every parameter's gradient and, after two steps of an optimizer, its weight are compared in
float64. Ranks have unequal numbers of tokens, gradients accumulate, and in one case parameters are
frozen; tied weights are in play where the module has them. Dropout is off.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional

from paceline.core import rng
from paceline.core.errors import UsageError
from paceline.data.batch import IGNORED
from paceline.dist.testing import run_ranks
from paceline.optim.scale import global_mean
from paceline.parallel.module import parallelize, require_for_module
from paceline.plan.plan import Plan, PrecisionConfig
from paceline.verify.certify import BOUND, Certificate
from paceline.verify.compare import (
    gradient_errors,
    relative_error,
    uncovered,
    weight_errors,
    whole_pieces,
)

Forward = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""``forward(module, tokens_BT, is_text_BT) -> logits_BTV``."""

_NUM_STEPS = 2
_NUM_MICROBATCHES = 2
_SEQUENCES = 2  # of a micro-batch
_MAX_LENGTH = 13
_FROZEN_EVERY = 3
_HINT = "forward=lambda module, tokens_BT, is_text_BT: ..., giving logits_BTV"


class _Batch(NamedTuple):
    """A micro-batch: tokens, which of them are text, and the labels of those that have one."""

    tokens_BT: Tensor
    is_text_BT: Tensor
    labels_BT: Tensor

    @property
    def num_labels(self) -> int:
        return int((self.labels_BT != IGNORED).sum())


@dataclass(frozen=True, slots=True)
class _Step:
    """What one step gives: the mean loss, gradients, and all weights after it."""

    loss: float
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]


class _Error(NamedTuple):
    """The error of one thing; the greatest of several is the worst."""

    error: float
    kind: str  # gradient, weight or loss
    name: str
    where: str


def _sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def _adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    # A smaller eps amplifies rounding where gradients vanish.
    return torch.optim.AdamW(parameters, lr=0.01, eps=1e-4, weight_decay=0.1)


CASES = {"sgd": (_sgd, False), "adamw, frozen parameters": (_adamw, True)}
"""Case to its optimizer, and whether every third parameter is frozen."""


def certify_module(module: nn.Module, plan: Plan, *, forward: Forward | None = None) -> Certificate:
    """Trains copies of a module on forked ranks and in one process, and compares.

    Args:
        module: takes token ids and gives logits; it is left as it is.
        plan: its layout is certified; precision is float64.
        forward: how the module is called. By default Hugging Face's way where its ``forward`` has
            ``input_ids``, else ``module(tokens_BT)``.

    Raises:
        ConfigError: the plan has problems.
        UsageError: the module cannot be called, or does not take token ids.
    """
    plan = replace(
        plan, precision=PrecisionConfig(params="float64", compute="float64", reduce="float64")
    )
    require_for_module(plan)
    call = forward or _call
    length = max(2, min(plan.train.sequence_length, _MAX_LENGTH))
    steps = _batches(plan, _vocab_size(module), length)
    errors: list[_Error] = []
    for case in CASES:
        errors += _certify_case(case, _double(module), plan, steps, call)
    return _certificate(errors)


def _certify_case(
    case: str, module: nn.Module, plan: Plan, steps: list[list[list[_Batch]]], call: Forward
) -> list[_Error]:
    make_optimizer, is_frozen = CASES[case]
    if is_frozen:
        for parameter in list(module.parameters())[1::_FROZEN_EVERY]:
            parameter.requires_grad_(False)
    alone = copy.deepcopy(module)
    everything = [[batch for rank in ranks for batch in rank] for ranks in steps]
    optimizer = make_optimizer(_trained(alone))
    expected = list(_train(alone, alone, everything, optimizer, _mean, call))

    def run(rank: int) -> list[_Error]:
        # Forked ranks see what one process found: only errors travel back.
        whole = parallelize(module, plan)
        mine = [ranks[rank] for ranks in steps]
        optimizer = make_optimizer(_trained(module))
        found = _train(whole, module, mine, optimizer, global_mean, call)
        pairs = zip(found, expected, strict=True)
        where = f"{case}, step {{}}, rank {rank}"
        return [e for n, pair in enumerate(pairs, 1) for e in _compare(*pair, where.format(n))]

    num_ranks = plan.mesh.num_ranks
    found = [run(0)] if num_ranks == 1 else run_ranks(run, num_ranks, timeout_s=600, mesh=plan.mesh)
    return [error for errors in found for error in errors]


def _train(
    whole: nn.Module,
    module: nn.Module,
    steps: Sequence[Sequence[_Batch]],
    optimizer: torch.optim.Optimizer,
    mean: Callable[[Tensor, int], Tensor],
    call: Forward,
) -> Iterator[_Step]:
    """A plain loop, the same alone and on a rank.

    Args:
        whole: what is called.
        module: what holds the parameters, under their own names.
        steps: micro-batches of each step.
        optimizer: of the trained parameters.
        mean: (loss sum of a micro-batch, tokens of the step) to what backward runs on.
        call: gives logits.
    """
    for batches in steps:
        count = sum(batch.num_labels for batch in batches)
        loss = 0.0
        for batch in batches:
            share = mean(_loss_sum(_logits(whole, batch, call), batch), count)
            share.backward()
            loss += share.item()
        gradients = {n: _whole(p.grad) for n, p in module.named_parameters() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
        weights = {name: _whole(p.detach()).clone() for name, p in module.named_parameters()}
        yield _Step(loss, gradients, weights)


def _mean(loss_sum: Tensor, count: int) -> Tensor:
    return loss_sum / count


def _loss_sum(logits_BTV: Tensor, batch: _Batch) -> Tensor:
    logits_RV, labels_R = logits_BTV.flatten(0, 1), batch.labels_BT.flatten()
    return functional.cross_entropy(logits_RV, labels_R, ignore_index=IGNORED, reduction="sum")


def _logits(module: nn.Module, batch: _Batch, call: Forward) -> Tensor:
    try:
        logits_BTV = call(module, batch.tokens_BT, batch.is_text_BT)
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        message = f"cannot call {type(module).__name__} in float64: {error}"
        raise UsageError(message, hint=_HINT) from error
    is_right = isinstance(logits_BTV, Tensor) and logits_BTV.shape[:-1] == batch.tokens_BT.shape
    if not is_right:
        found = tuple(logits_BTV.shape) if isinstance(logits_BTV, Tensor) else type(logits_BTV)
        message = f"{type(module).__name__} gives {found}, not logits for each of"
        raise UsageError(f"{message} {tuple(batch.tokens_BT.shape)} tokens", hint=_HINT)
    return logits_BTV


def _call(module: nn.Module, tokens_BT: Tensor, is_text_BT: Tensor) -> Tensor:
    inner = module.module if isinstance(module, nn.parallel.DistributedDataParallel) else module
    parameters = inspect.signature(inner.forward).parameters
    if "input_ids" not in parameters:
        return module(tokens_BT)
    mask = {"attention_mask": is_text_BT.long()} if "attention_mask" in parameters else {}
    return module(input_ids=tokens_BT, **mask).logits


def _compare(found: _Step, expected: _Step, where: str) -> Iterator[_Error]:
    gradients, weights = whole_pieces(found.gradients), whole_pieces(found.weights)
    boxes = {name: [box] for name, (_, box) in gradients.items()}
    for name in uncovered(boxes, expected.gradients):
        yield _error(float("inf"), "gradient", name, where)
    for name, error in gradient_errors(gradients, expected.gradients).items():
        yield _error(error, "gradient", name, where)
    for name, error in weight_errors(weights, expected.weights).items():
        yield _error(error, "weight", name, where)
    yield _error(relative_error(found.loss, expected.loss), "loss", "loss", where)


def _error(error: float, kind: str, name: str, where: str) -> _Error:
    """NaN, which no comparison would catch, is the largest."""
    return _Error(error if error < sys.float_info.max else sys.float_info.max, kind, name, where)


def _certificate(errors: list[_Error]) -> Certificate:
    names = {error.name: {"gradient": 0.0, "weight": 0.0} for error in errors}
    del names["loss"]
    largest = {"gradient": 0.0, "weight": 0.0, "loss": 0.0}
    for error, kind, name, _ in errors:
        largest[kind] = max(largest[kind], error)
        if kind != "loss":
            names[name][kind] = max(names[name][kind], error)
    worst = max(errors)
    return Certificate(
        certified=max(largest.values()) <= BOUND,
        max_rel_grad_error=largest["gradient"],
        max_rel_param_error=largest["weight"],
        loss_error=largest["loss"],
        worst=f"{worst.name}, {worst.where}: {worst.error:.1e}",
        per_parameter=names,
    )


def _double(module: nn.Module) -> nn.Module:
    double = copy.deepcopy(module).to("cpu", torch.float64).eval()
    choose_experts = getattr(double, "set_experts_implementation", None)
    if choose_experts is not None:  # the grouped products of `transformers` know no float64
        choose_experts("eager")
    return double


def _trained(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _vocab_size(module: nn.Module) -> int:
    """Rows of the first embedding, which is that of tokens."""
    for part in module.modules():
        if isinstance(part, nn.Embedding):
            return part.num_embeddings
    message = f"{type(module).__name__} has no nn.Embedding: verify feeds it token ids"
    raise UsageError(message, hint="wrap it in a module that takes tokens")


def _batches(plan: Plan, vocab_size: int, length: int) -> list[list[list[_Batch]]]:
    """Random texts of random lengths, padded: steps, ranks, micro-batches."""
    ranks = range(plan.mesh.num_ranks)
    microbatches = range(plan.pipeline.num_microbatches or _NUM_MICROBATCHES)

    def batch(step: int, rank: int, microbatch: int) -> _Batch:
        stream, size = f"{step}.{rank}.{microbatch}", _SEQUENCES * length
        draws = rng.bits(size, seed=plan.train.seed, purpose="verify tokens", stream=stream)
        lengths = rng.bits(_SEQUENCES, seed=plan.train.seed, purpose="verify length", stream=stream)
        tokens_BT = torch.from_numpy((draws % np.uint64(vocab_size)).astype(np.int64))
        tokens_BT = tokens_BT.view(_SEQUENCES, length)
        ends_B1 = 2 + torch.from_numpy((lengths % np.uint64(length - 1)).astype(np.int64))[:, None]
        positions_T = torch.arange(length)
        labels_BT = tokens_BT.roll(-1, dims=1).where(positions_T + 1 < ends_B1, IGNORED)
        return _Batch(tokens_BT, positions_T < ends_B1, labels_BT)

    return [
        [[batch(step, rank, n) for n in microbatches] for rank in ranks]
        for step in range(_NUM_STEPS)
    ]
