"""From logits to a token: the only home of temperature, top-k and top-p.

A sample is argmax(log p + Gumbel noise) (Gumbel-max), and the noise is a function of the seed,
the answer's number and the token's position. So what is sampled does not depend on what else
runs, on how a prompt is cut into chunks, or on who proposes the token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from paceline.core import rng
from paceline.kernels.choose import draw_rows, highest_rows

_LEAST_TEMPERATURE = 1e-30  # the most likely token, as far as that goes; less would overflow


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How tokens are chosen.

    Attributes:
        temperature: 0 takes the most likely token; else logits are divided by it.
        top_k: how many of the most likely tokens are kept; 0 for all.
        top_p: the most likely tokens are kept until their probabilities reach it.
        seed: of the noise.
        stream: which of several answers with one seed this is.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stream: int = 0


@dataclass(frozen=True, slots=True)
class Draw:
    """A token that is to be chosen.

    Attributes:
        params: how.
        position: index of the new token in its sequence, the prompt included.
    """

    params: SamplingParams
    position: int


@dataclass(frozen=True, slots=True)
class Sampled:
    """A token that has been chosen.

    Attributes:
        token: its id.
        logprob: its log-probability under the model, before temperature and all else; None unless
            asked for.
        top: the most likely tokens and theirs, as many as were asked for, the likeliest first.
    """

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def sample_rows(logits_RV: Tensor, draws: Sequence[Draw]) -> list[Sampled]:
    """A token for each row; what one row gives does not depend on the others.

    Args:
        logits_RV: of the model, in any dtype and on any device.
        draws: how to choose, one a row.
    """
    is_greedy = [draw.params.temperature == 0 for draw in draws]
    is_plain = [draw.params.top_k == 0 and draw.params.top_p >= 1 for draw in draws]
    if all(is_greedy):
        return [Sampled(token) for token in highest_rows(logits_RV)]
    if any(is_greedy) or not all(is_plain):
        found: Sequence[int | None] = [None] * len(draws)
    else:
        found = draw_plainly(logits_RV, draws)
    return [
        Sampled(sample(logits_V, draw.params, draw.position) if token is None else token)
        for logits_V, draw, token in zip(logits_RV, draws, found, strict=True)
    ]


def draw_plainly(logits_RV: Tensor, draws: Sequence[Draw]) -> list[int | None]:
    """Tokens of draws by temperature alone, as `sample` gives them; None where it has to."""
    keys = [
        rng.key(seed=draw.params.seed, purpose="sample", stream=draw.params.stream)
        for draw in draws
    ]
    temperatures = [max(draw.params.temperature, _LEAST_TEMPERATURE) for draw in draws]
    return draw_rows(logits_RV, temperatures, keys, [draw.position for draw in draws])


def sample(logits_V: Tensor, params: SamplingParams, position: int) -> int:
    """The token at a position.

    Args:
        logits_V: of the model, in any dtype and on any device.
        params: how to choose.
        position: index of the new token in its sequence, the prompt included.
    """
    if params.temperature == 0:
        return int(logits_V.argmax())
    scores_V = processed_logits(logits_V, params)
    noise = rng.gumbel(
        len(scores_V), seed=params.seed, purpose="sample", stream=params.stream, position=position
    )
    return int((scores_V + torch.from_numpy(noise)).argmax())


def processed_logits(logits_V: Tensor, params: SamplingParams) -> Tensor:
    """Unnormalised log-probabilities after temperature, then top-k, then top-p; float64, CPU."""
    scores_V = logits_V.to("cpu", torch.float64) / max(params.temperature, _LEAST_TEMPERATURE)
    if 0 < params.top_k < len(scores_V):
        threshold = torch.topk(scores_V, params.top_k).values[-1]
        scores_V = scores_V.masked_fill(scores_V < threshold, -torch.inf)
    if params.top_p < 1.0:
        sorted_V, order_V = scores_V.sort(descending=True, stable=True)
        probs_V = sorted_V.softmax(dim=0)
        before_V = probs_V.cumsum(dim=0) - probs_V
        scores_V = scores_V.index_fill(0, order_V[before_V >= params.top_p], -torch.inf)
    return scores_V
