"""Log-probabilities of tokens under the model, before temperature and all else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_SLICE_ROWS = 32  # a row of float64 is large


@dataclass(frozen=True, slots=True)
class Sampled:
    """A token that has been chosen, or that a prompt holds.

    Attributes:
        token: its id.
        logprob: its log-probability under the model, before temperature and all else; None unless
            asked for.
        top: the most likely tokens and theirs, as many as were asked for, the likeliest first.
    """

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def with_logprobs(logits_RV: Tensor, tokens: Sequence[int], num_top: int) -> list[Sampled]:
    """Tokens with their log-probabilities, in float64.

    Args:
        logits_RV: of the model, in any dtype and on any device.
        tokens: one a row.
        num_top: how many of the likeliest tokens are told of; of equal ones those that come first.
    """
    told: list[Sampled] = []
    for start in range(0, len(tokens), _SLICE_ROWS):
        part_RV = logits_RV[start : start + _SLICE_ROWS].to("cpu", torch.float64)
        logprobs_RV = part_RV.log_softmax(dim=-1)
        for logprobs_V, token in zip(logprobs_RV, tokens[start : start + _SLICE_ROWS], strict=True):
            told.append(Sampled(token, float(logprobs_V[token]), _top(logprobs_V, num_top)))
    return told


def _top(logprobs_V: Tensor, num: int) -> tuple[tuple[int, float], ...]:
    if num == 0:
        return ()
    least = torch.topk(logprobs_V, num).values[-1]
    tokens_U = (logprobs_V >= least).nonzero()[:, 0]  # more than `num` where some are equal
    sorted_U, order_U = logprobs_V[tokens_U].sort(descending=True, stable=True)
    found = zip(tokens_U[order_U[:num]].tolist(), sorted_U[:num].tolist(), strict=True)
    return tuple(found)
