"""From logits to a token.

What is done to a row of float64 logits, in this order: repetition penalty; presence and frequency
penalties; logit bias; grammar; no end before the least length. Temperature 0 takes the most likely
token then. Else come temperature, top-k, top-p and min-p, each of what is left by those before
it, and a token is sampled.

A sample is argmax(log p + Gumbel noise) (Gumbel-max), and the noise is a function of the seed,
the answer's number and the token's position. So what is sampled does not depend on what else
runs, on how a prompt is cut into chunks, or on who proposes the token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from paceline.core import rng
from paceline.decode.grammar import Grammar, GrammarMask, Grammars
from paceline.decode.logprobs import Sampled, with_logprobs
from paceline.decode.processors import (
    Bias,
    DeadEndError,
    History,
    MinP,
    NoEnd,
    Occurrence,
    Processor,
    Repetition,
    Temperature,
    TopK,
    TopP,
)


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


@dataclass(frozen=True, slots=True)
class Refused:
    """A token that could not be chosen.

    Attributes:
        why: in words for whoever asked.
    """

    why: str


class Chain(NamedTuple):
    """What is done to the logits of one request.

    Attributes:
        allow: what the most likely token is chosen from.
        cut: temperature, and what drops unlikely tokens.
    """

    allow: tuple[Processor, ...] = ()
    cut: tuple[Processor, ...] = ()


class Sampler:
    """Chooses tokens of many requests, and remembers what each one's history comes to.

    Args:
        grammars: of the model; None where there are none.
    """

    def __init__(self, grammars: Grammars | None = None) -> None:
        self._grammars = grammars
        self._chains: dict[int, Chain] = {}

    def sample(self, logits_RV: Tensor, draws: Mapping[int, Draw]) -> dict[int, Sampled | Refused]:
        """A token for each request.

        Args:
            logits_RV: of the model, one row a request, in any dtype and on any device.
            draws: request id to how its token is chosen, in the order of the rows.
        """
        chains = [self._chain(request_id, draw) for request_id, draw in draws.items()]
        found = sample_rows(logits_RV, list(draws.values()), chains)
        return dict(zip(draws, found, strict=True))

    def forget(self, request_id: int) -> None:
        """Of a request that has ended or begins anew, known or not."""
        self._chains.pop(request_id, None)

    def _chain(self, request_id: int, draw: Draw) -> Chain:
        chain = self._chains.get(request_id)
        if chain is None:
            mask = None
            if draw.grammar is not None:
                assert self._grammars is not None, "a grammar that nobody has checked"
                mask = self._grammars.mask(draw.grammar)
            chain = self._chains[request_id] = chain_of(draw, mask)
        return chain


def chain_of(draw: Draw, mask: GrammarMask | None = None) -> Chain:
    """What a request asks to be done to its logits.

    Args:
        draw: of any of its tokens.
        mask: of its grammar.
    """
    params = draw.params
    allow: list[Processor] = []
    if params.repetition_penalty != 1:
        allow.append(Repetition(params.repetition_penalty))
    if params.presence_penalty or params.frequency_penalty:
        allow.append(Occurrence(params.presence_penalty, params.frequency_penalty))
    if params.logit_bias:
        allow.append(Bias(params.logit_bias))
    if mask is not None:
        allow.append(mask)
    if draw.end_ids and draw.min_tokens:
        allow.append(NoEnd(draw.min_tokens, draw.end_ids))
    return Chain(tuple(allow), _cut(params))


def _cut(params: SamplingParams) -> tuple[Processor, ...]:
    if params.temperature == 0:
        return ()
    cut: list[Processor] = [Temperature(params.temperature)]
    if params.top_k:
        cut.append(TopK(params.top_k))
    if params.top_p < 1:
        cut.append(TopP(params.top_p))
    if params.min_p:
        cut.append(MinP(params.min_p))
    return tuple(cut)


def sample_rows(
    logits_RV: Tensor, draws: Sequence[Draw], chains: Sequence[Chain] | None = None
) -> list[Sampled | Refused]:
    """A token for each row; what one row gives does not depend on the others.

    Rows are taken together by what they need: the most likely token, a sample at a temperature,
    and each of the others by itself.

    Args:
        logits_RV: of the model, in any dtype and on any device.
        draws: how to choose, one a row.
        chains: what each asks for, where a sampler has kept it.
    """
    chains = [chain_of(draw) for draw in draws] if chains is None else chains
    greedy, plain, others = _grouped(draws, chains)
    tokens: dict[int, int | Refused] = {}
    if greedy:
        tokens |= zip(greedy, _rows(logits_RV, greedy).argmax(dim=-1).tolist(), strict=True)
    for row in plain:
        tokens[row] = sample(logits_RV[row], draws[row].params, draws[row].position)
    for row in others:
        tokens[row] = _sample_processed(logits_RV[row], draws[row], chains[row])
    return _told(logits_RV, draws, [tokens[row] for row in range(len(draws))])


def _grouped(
    draws: Sequence[Draw], chains: Sequence[Chain]
) -> tuple[list[int], list[int], list[int]]:
    """Rows whose most likely token is wanted, those with a temperature alone, and the others."""
    greedy: list[int] = []
    plain: list[int] = []
    others: list[int] = []
    for row, (draw, chain) in enumerate(zip(draws, chains, strict=True)):
        if chain.allow or len(chain.cut) > 1:
            others.append(row)
        else:
            (greedy if draw.params.temperature == 0 else plain).append(row)
    return greedy, plain, others


def _rows(logits_RV: Tensor, rows: Sequence[int]) -> Tensor:
    return logits_RV if len(rows) == len(logits_RV) else logits_RV[list(rows)]


def _told(
    logits_RV: Tensor, draws: Sequence[Draw], tokens: Sequence[int | Refused]
) -> list[Sampled | Refused]:
    """The tokens, with log-probabilities where these are asked for."""
    found = [Sampled(token) if isinstance(token, int) else token for token in tokens]
    for row, (draw, token) in enumerate(zip(draws, tokens, strict=True)):
        if draw.num_logprobs is not None and isinstance(token, int):
            (found[row],) = with_logprobs(logits_RV[row : row + 1], [token], draw.num_logprobs)
    return found


def _sample_processed(logits_V: Tensor, draw: Draw, chain: Chain) -> int | Refused:
    """The token of a row that is processed by itself."""
    history = History(draw.history, draw.num_prompt)
    scores_V = logits_V.to("cpu", torch.float64)
    try:
        for process in (*chain.allow, *chain.cut):
            scores_V = process(scores_V, history)
    except DeadEndError as error:
        return Refused(str(error))
    if draw.params.temperature == 0:
        return int(scores_V.argmax())
    return _choose(scores_V, draw.params, draw.position)


def sample(logits_V: Tensor, params: SamplingParams, position: int) -> int:
    """The token at a position, of what needs no history.

    Args:
        logits_V: of the model, in any dtype and on any device.
        params: how to choose, without penalties.
        position: index of the new token in its sequence, the prompt included.
    """
    assert not params.uses_history, "penalties need a history"
    if params.temperature == 0 and not params.logit_bias:
        return int(logits_V.argmax())
    scores_V = processed_logits(logits_V, params)
    if params.temperature == 0:
        return int(scores_V.argmax())
    return _choose(scores_V, params, position)


def processed_logits(
    logits_V: Tensor, params: SamplingParams, history: History | None = None
) -> Tensor:
    """Unnormalised log-probabilities after all that `params` ask for; float64, CPU."""
    scores_V = logits_V.to("cpu", torch.float64)
    chain = chain_of(Draw(params, 0))
    for process in (*chain.allow, *chain.cut):
        scores_V = process(scores_V, history or History((), 0))
    return scores_V


def _choose(scores_V: Tensor, params: SamplingParams, position: int) -> int:
    """A sample from unnormalised log-probabilities; noise is made for what is left of them."""
    kept_U = (scores_V > -torch.inf).nonzero()[:, 0]
    noise_U = rng.gumbel(
        len(scores_V),
        seed=params.seed,
        purpose="sample",
        stream=params.stream,
        position=position,
        at=kept_U.numpy(),
    )
    return int(kept_U[(scores_V[kept_U] + torch.from_numpy(noise_U)).argmax()])
