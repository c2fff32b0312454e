"""What is done to a token's logits before one is chosen: the family of sampler processors.

A processor is called with a row of logits and with what came before, and returns the row that it
makes of them. It may remember: a row of the same sequence comes again with more history, or, where
proposals were rejected, with less. Its answer depends on the row and the history alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from paceline.core.errors import PacelineError

LEAST_TEMPERATURE = 1e-30
"""The most likely token, as far as that goes; less would overflow."""
_GAPS = (4.0, 8.0, math.inf)  # below the largest logit: top-p sorts no more than it needs


class DeadEndError(PacelineError):
    """No token can follow; the request that it happens to cannot be answered."""


class History(NamedTuple):
    """What comes before the token that is chosen.

    Attributes:
        tokens: of the prompt and the answer; a view that grows, not a copy.
        num_prompt: how many of them are the prompt's.
    """

    tokens: Sequence[int]
    num_prompt: int


class Processor(Protocol):
    """Makes a row of logits of a row of logits; float64, on the CPU. The one given stays."""

    def __call__(self, logits_V: Tensor, history: History) -> Tensor: ...


class Counts:
    """How often each token occurs in a sequence, kept as it grows or is cut back."""

    def __init__(self) -> None:
        self._counted: list[int] = []
        self._places: dict[int, int] = {}
        self._tokens_U = np.empty(64, np.int64)
        self._counts_U = np.zeros(64, np.float64)

    def follow(self, tokens: Sequence[int], start: int) -> tuple[Tensor, Tensor]:
        """The tokens that have occurred, and how often each does now.

        Args:
            tokens: the sequence; up to its last call's end it is what it was then.
            start: index of the first token that counts.
        """
        while len(self._counted) > max(0, len(tokens) - start):
            self._add(self._counted.pop(), -1)
        for token in tokens[start + len(self._counted) :]:
            self._counted.append(token)
            self._add(token, 1)
        num = len(self._places)
        return torch.from_numpy(self._tokens_U[:num]), torch.from_numpy(self._counts_U[:num])

    def _add(self, token: int, count: int) -> None:
        place = self._places.setdefault(token, len(self._places))
        if place == len(self._tokens_U):
            self._tokens_U = np.concatenate([self._tokens_U, np.empty_like(self._tokens_U)])
            self._counts_U = np.concatenate([self._counts_U, np.zeros_like(self._counts_U)])
        self._tokens_U[place] = token
        self._counts_U[place] += count


class Repetition:
    """Makes tokens that have occurred less likely.

    Source: Keskar et al., CTRL, arXiv:1909.05858, Sec. 4.1.
    Differs: a negative logit is multiplied, as engines do, since dividing it would favour it.

    Args:
        penalty: positive logits of tokens of the prompt and the answer are divided by it.
    """

    def __init__(self, penalty: float) -> None:
        self._penalty, self._counts = penalty, Counts()

    def __call__(self, logits_V: Tensor, history: History) -> Tensor:
        tokens_U, counts_U = self._counts.follow(history.tokens, 0)
        tokens_U = tokens_U[counts_U > 0]
        found_U = logits_V[tokens_U]
        scaled_U = torch.where(found_U > 0, found_U / self._penalty, found_U * self._penalty)
        return logits_V.index_copy(0, tokens_U, scaled_U)


class Occurrence:
    """OpenAI's penalties, over the answer: logit - frequency * count - presence * (count > 0).

    Args:
        presence: for each token that the answer holds.
        frequency: for each time that it does.
    """

    def __init__(self, presence: float, frequency: float) -> None:
        self._presence, self._frequency, self._counts = presence, frequency, Counts()

    def __call__(self, logits_V: Tensor, history: History) -> Tensor:
        tokens_U, counts_U = self._counts.follow(history.tokens, history.num_prompt)
        penalties_U = self._frequency * counts_U + self._presence * (counts_U > 0).double()
        return logits_V.index_add(0, tokens_U, penalties_U, alpha=-1)


class Bias:
    """Adds to the logits of some tokens.

    Args:
        pairs: of a token and what is added to its logit.
    """

    def __init__(self, pairs: Sequence[tuple[int, float]]) -> None:
        self._tokens_U = torch.tensor([token for token, _ in pairs])
        self._biases_U = torch.tensor([bias for _, bias in pairs], dtype=torch.float64)

    def __call__(self, logits_V: Tensor, history: History) -> Tensor:  # noqa: ARG002
        return logits_V.index_add(0, self._tokens_U, self._biases_U)


class NoEnd:
    """Forbids an answer's end before it has its least length, unless nothing else may come.

    Args:
        min_tokens: the answer's least length.
        end_ids: tokens that end it.
    """

    def __init__(self, min_tokens: int, end_ids: Sequence[int]) -> None:
        self._min_tokens, self._end_ids_U = min_tokens, torch.tensor(end_ids, dtype=torch.long)

    def __call__(self, logits_V: Tensor, history: History) -> Tensor:
        if len(history.tokens) - history.num_prompt >= self._min_tokens:
            return logits_V
        without_V = logits_V.index_fill(0, self._end_ids_U, -torch.inf)
        return logits_V if without_V.max() == -torch.inf else without_V


class Temperature:
    """Divides logits.

    Args:
        temperature: above 0.
    """

    def __init__(self, temperature: float) -> None:
        self._temperature = max(temperature, LEAST_TEMPERATURE)

    def __call__(self, logits_V: Tensor, history: History) -> Tensor:  # noqa: ARG002
        return logits_V / self._temperature


class TopK:
    """Keeps the most likely tokens; what ties with the last of them stays as well.

    Args:
        top_k: how many.
    """

    def __init__(self, top_k: int) -> None:
        self._top_k = top_k

    def __call__(self, logits_V: Tensor, history: History) -> Tensor:  # noqa: ARG002
        if self._top_k >= len(logits_V):
            return logits_V
        least = logits_V.topk(self._top_k).values[-1]
        return logits_V.masked_fill(logits_V < least, -torch.inf)


class TopP:
    """Keeps the most likely tokens until their probabilities reach a sum; ties stay in order.

    Source: Holtzman et al., The Curious Case of Neural Text Degeneration, arXiv:1904.09751, Sec. 3.

    Args:
        top_p: the sum, of the probabilities of what other processors have left.
    """

    def __init__(self, top_p: float) -> None:
        self._top_p = top_p

    def __call__(self, logits_V: Tensor, history: History) -> Tensor:  # noqa: ARG002
        most = logits_V.max()
        total = (logits_V - most).exp().sum()
        for gap in _GAPS:
            places_U, sorted_U = _sorted_above(logits_V, most - gap)
            probs_U = (sorted_U - most).exp() / total
            is_beyond_U = probs_U.cumsum(0) - probs_U >= self._top_p
            if is_beyond_U.any():  # the sum is reached among those that were sorted
                kept_U = places_U[: int(is_beyond_U.byte().argmax())]
                return torch.full_like(logits_V, -torch.inf).index_copy(0, kept_U, logits_V[kept_U])
        return logits_V


class MinP:
    """Drops tokens that are less likely than a share of the likeliest one.

    Source: Nguyen et al., Turning Up the Heat: Min-p Sampling, arXiv:2407.01082, Sec. 3.

    Args:
        min_p: the share, above 0.
    """

    def __init__(self, min_p: float) -> None:
        self._below = math.log(min_p)

    def __call__(self, logits_V: Tensor, history: History) -> Tensor:  # noqa: ARG002
        return logits_V.masked_fill(logits_V < logits_V.max() + self._below, -torch.inf)


def _sorted_above(logits_V: Tensor, least: Tensor) -> tuple[Tensor, Tensor]:
    """Places and logits of what is not below `least`, the likeliest first; ties by their places."""
    places_U = (logits_V >= least).nonzero()[:, 0]
    sorted_U, order_U = logits_V[places_U].sort(descending=True, stable=True)
    return places_U[order_U], sorted_U
