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
from paceline.core.errors import RequestError
from paceline.decode.draw import Draw, SamplingParams
from paceline.decode.grammar import GrammarMask, Grammars
from paceline.decode.logprobs import Sampled, with_logprobs
from paceline.decode.processors import (
    LEAST_TEMPERATURE,
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
from paceline.kernels.choose import draw_rows, highest_rows


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
            chain = self._chains[request_id] = chain_of(draw, self._grammars)
        return chain


def chain_of(draw: Draw, grammars: Grammars | None = None) -> Chain:
    """What a request asks to be done to its logits.

    Args:
        draw: of any of its tokens.
        grammars: that its own is one of.
    """
    params = draw.params
    allow: list[Processor] = []
    if params.repetition_penalty != 1:
        allow.append(Repetition(params.repetition_penalty))
    if params.presence_penalty or params.frequency_penalty:
        allow.append(Occurrence(params.presence_penalty, params.frequency_penalty))
    if params.logit_bias:
        allow.append(Bias(params.logit_bias))
    if draw.grammar is not None:
        assert grammars is not None, "a grammar that nobody has checked"
        allow.append(GrammarMask(grammars, draw.grammar))
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
        tokens |= zip(greedy, highest_rows(_rows(logits_RV, greedy)), strict=True)
    if plain:
        drawn = draw_plainly(_rows(logits_RV, plain), [draws[row] for row in plain])
        tokens |= {row: one for row, one in zip(plain, drawn, strict=True) if one is not None}
    for row in (*plain, *others):
        if row not in tokens:
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
        if draw.params.temperature == 0:
            return int(scores_V.argmax())
        return _choose(scores_V, draw.params, draw.position)
    except (DeadEndError, RequestError) as error:
        return Refused(error.message)


def draw_plainly(logits_RV: Tensor, draws: Sequence[Draw]) -> list[int | None]:
    """Tokens of draws by temperature alone, as `sample` gives them; None where it has to."""
    keys = [
        rng.key(seed=draw.params.seed, purpose="sample", stream=draw.params.stream)
        for draw in draws
    ]
    temperatures = [max(draw.params.temperature, LEAST_TEMPERATURE) for draw in draws]
    return draw_rows(logits_RV, temperatures, keys, [draw.position for draw in draws])


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
    if len(kept_U) == 0:
        raise DeadEndError("no token is left to choose from; the model's logits are no numbers")
    noise_U = rng.gumbel(
        len(scores_V),
        seed=params.seed,
        purpose="sample",
        stream=params.stream,
        position=position,
        at=kept_U.numpy(),
    )
    return int(kept_U[(scores_V[kept_U] + torch.from_numpy(noise_U)).argmax()])
