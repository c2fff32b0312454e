"""How a token is chosen, as plain data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from paceline.decode.grammar import Grammar


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How tokens are chosen.

    Attributes:
        temperature: 0 takes the most likely token; else logits are divided by it.
        top_k: how many of the most likely tokens are kept; 0 for all.
        top_p: the most likely tokens are kept until their probabilities reach it.
        min_p: tokens less likely than this share of the likeliest one are dropped; 0 for none.
        presence_penalty: taken off the logit of each token that the answer holds.
        frequency_penalty: taken off it as many times as the answer holds the token.
        repetition_penalty: positive logits of tokens of the prompt and the answer are divided by
            it, negative ones multiplied; 1 for none.
        logit_bias: pairs of a token and what is added to its logit.
        seed: of the noise.
        stream: which of several answers with one seed this is.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0
    stream: int = 0

    @property
    def uses_history(self) -> bool:
        """Whether what comes before matters beside the logits."""
        penalties = (self.presence_penalty, self.frequency_penalty)
        return any(penalties) or self.repetition_penalty != 1


@dataclass(frozen=True, slots=True)
class Draw:
    """A token that is to be chosen; plain data, so that another process may do it.

    Attributes:
        params: how.
        position: index of the new token in its sequence, the prompt included.
        history: the tokens before it, a view that grows; empty where nothing needs them.
        num_prompt: how many of them are the prompt's.
        num_logprobs: likeliest tokens that are told of; None for no log-probabilities.
        min_tokens: the answer's least length.
        end_ids: tokens that end it; empty where it has no least length.
        grammar: what the answer's text must be.
    """

    params: SamplingParams
    position: int
    history: Sequence[int] = ()
    num_prompt: int = 0
    num_logprobs: int | None = None
    min_tokens: int = 0
    end_ids: tuple[int, ...] = ()
    grammar: Grammar | None = None
