"""The head's passes of a rank's words: S scores hidden states, T makes the gradients.

Between the two, ranks know the statistics of each other's logits, and with them the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from paceline.core.errors import PacelineError
from paceline.dist.p2p import PendingTensor
from paceline.kernels.cross_entropy import (
    Statistics,
    add_product,
    local_statistics,
    logits_gradient,
    sum_of,
)
from paceline.models.layout import Layout
from paceline.models.vocabulary import Head, Output, WholeVocabulary, logits
from paceline.parallel.pipeline.base import Action, Kind
from paceline.parallel.pipeline.runtime import Handler
from paceline.parallel.pipeline.words import Words, arrived

_RULE = "an objective has to give what the model's head makes of a micro-batch, as it is"
_HINT = 'use pipeline.vocabulary = "edges"'


class _Losses(WholeVocabulary):
    """Stands for a vocabulary of which each rank has some words; keeps what a loss is made of."""

    def __init__(self) -> None:
        self.rows_RD = self.labels_R = self.is_valid_R = torch.empty(0)
        self.loss: Tensor | None = None

    def logits(self, x_BTD: Tensor, weight_VD: Tensor) -> Tensor:
        """Refuses.

        Raises:
            PacelineError: always.
        """
        del x_BTD, weight_VD
        raise PacelineError("words are spread over ranks, none of which has all logits", hint=_HINT)

    def cross_entropy(
        self, x_RD: Tensor, weight_VD: Tensor, labels_R: Tensor, *, ignored: int
    ) -> Tensor:
        """What stands for the loss, which is not known before all ranks' statistics are.

        Raises:
            PacelineError: a second loss.
        """
        if self.loss is not None:
            raise PacelineError(f"{_RULE}: one loss", hint=_HINT)
        self.rows_RD, self.labels_R, self.is_valid_R = x_RD, labels_R, labels_R != ignored
        self.loss = torch.zeros((), device=weight_VD.device)
        return self.loss


class _Scorer:
    """Called as a model, hands hidden states to a head.

    Args:
        hidden_BTD: after the last norm.
        output: what the head predicts with.
    """

    def __init__(self, hidden_BTD: Tensor, output: Output) -> None:
        self._hidden_BTD, self._output = hidden_BTD, output

    def __call__(
        self, tokens_BT: Tensor, layout: Layout | None = None, *, head: Head = logits
    ) -> Tensor:
        del tokens_BT, layout
        return head(self._hidden_BTD, self._output)


class _Settled(NamedTuple):
    """What all ranks' statistics give.

    Attributes:
        parts: of each rank.
        whole: of all.
        scale: the gradient for the loss of what backward runs on.
    """

    parts: list[Statistics]
    whole: Statistics
    scale: Tensor


@dataclass(slots=True)
class _Scored:
    """One micro-batch from S to the last pass that needs it.

    Attributes:
        hidden_BTD: what the head was given.
        rows_RD: what the head made of it, with its graph where the last stage is.
        is_valid_R: which rows have a label.
        rows_CD: these rows.
        labels_C: their labels.
        exps_CV: exponentials of this rank's logits, until T.
        num_uses: passes that are still to come.
        statistics: of each rank, (3, C).
        terms: of the gradient of rows, from each rank.
        settled: once all statistics are here.
    """

    hidden_BTD: Tensor
    rows_RD: Tensor
    is_valid_R: Tensor
    rows_CD: Tensor
    labels_C: Tensor
    exps_CV: Tensor
    num_uses: int
    statistics: dict[int, Tensor | PendingTensor] = field(default_factory=dict)
    terms: dict[int, Tensor | PendingTensor] = field(default_factory=dict)
    settled: _Settled | None = None


class SpreadHead:
    """Runs the head's passes.

    Args:
        words: of this rank.
        num_barriers: 2: T makes terms of hidden states' gradient. 1: SI does, as far as this
            rank's statistics tell, and the last stage scales them.
        scaled: what backward runs on, of a loss.
        seen: is told of each loss, where the last stage is.
    """

    def __init__(
        self,
        words: Words,
        num_barriers: int,
        *,
        scaled: Callable[[Tensor], Tensor],
        seen: Callable[[Tensor], None],
    ) -> None:
        self._words, self._shares = words, words.shares
        self._num_barriers, self._scaled, self._seen = num_barriers, scaled, seen
        self._is_last = words.shares.rank == words.last
        self._hidden: dict[int, Tensor | PendingTensor] = {}
        self._scored: dict[int, _Scored] = {}
        self.handlers: Mapping[Kind, Handler] = {
            Kind.SEND_HIDDEN: self._send_hidden,
            Kind.RECEIVE_HIDDEN: self._receive_hidden,
            Kind.SCORE: self._score,
            Kind.SCORE_INPUT: self._score_input,
            Kind.SEND_STATISTICS: self._send_statistics,
            Kind.RECEIVE_STATISTICS: self._receive_statistics,
            Kind.SCORE_BACKWARD: self._score_backward,
            Kind.SCORE_WEIGHT: self._score_weight,
            Kind.LOSS: self._loss,
            Kind.SEND_TERM: self._send_term,
            Kind.RECEIVE_TERM: self._receive_term,
        }

    @property
    def _weight(self) -> nn.Parameter:
        weight_VD = self._words.model.head_weight
        assert isinstance(weight_VD, nn.Parameter)
        return weight_VD

    # Hidden states

    def take_hidden(self, microbatch: int, hidden_BTD: Tensor) -> None:
        """What the last stage has made."""
        self._hidden[microbatch] = hidden_BTD

    def _send_hidden(self, action: Action) -> None:
        for rank in self._shares.others:
            self._words.send(arrived(self._hidden[action.microbatch]), rank, action.kind)

    def _receive_hidden(self, action: Action) -> None:
        shape, dtype = self._words.border()
        found = self._words.receive(shape, dtype, self._words.last, Kind.SEND_HIDDEN)
        self._hidden[action.microbatch] = found

    # S

    def _score(self, action: Action) -> None:
        self._words.run(lambda: self._make_scores(action.microbatch), self._weight)

    def _score_input(self, action: Action) -> None:
        def run() -> None:
            self._make_scores(action.microbatch)
            self._make_local_term(self._scored[action.microbatch])

        self._words.run(run, self._weight)

    def _make_scores(self, microbatch: int) -> None:
        is_traced = self._is_last and torch.is_grad_enabled()
        hidden_BTD = arrived(self._hidden.pop(microbatch)).detach().requires_grad_(is_traced)
        losses = _Losses()
        scorer = _Scorer(hidden_BTD, Output(losses, self._weight))
        with torch.set_grad_enabled(is_traced):
            found = self._words.call(scorer, microbatch)
        if found is not losses.loss:
            raise PacelineError(_RULE, hint=_HINT)
        with torch.no_grad():
            rows_CD = losses.rows_RD[losses.is_valid_R]
            labels_C = losses.labels_R[losses.is_valid_R]
            wide = torch.promote_types(rows_CD.dtype, torch.float32)
            logits_CV = rows_CD @ self._weight.to(rows_CD.dtype).T
            exps_CV, here = local_statistics(logits_CV, labels_C, self._shares.own, wide)
            scored = self._scored[microbatch] = _Scored(
                hidden_BTD,
                losses.rows_RD,
                losses.is_valid_R,
                rows_CD,
                labels_C,
                exps_CV.to(rows_CD.dtype),
                num_uses=1 + is_traced,
            )
            scored.statistics[self._shares.rank] = torch.stack(here)

    @torch.no_grad()
    def _make_local_term(self, scored: _Scored) -> None:
        """The term as this rank's statistics scale it, and behind it the labels' rows."""
        weight_VD, rank = self._weight.to(scored.rows_CD.dtype), self._shares.rank
        labels_n = scored.labels_C[self._shares.places(scored.labels_C, rank)]
        rows_nD = weight_VD[labels_n - self._shares.own.start]
        scored.terms[rank] = torch.cat([scored.exps_CV @ weight_VD, rows_nD])

    # Statistics

    def _send_statistics(self, action: Action) -> None:
        own_3C = arrived(self._scored[action.microbatch].statistics[self._shares.rank])
        for rank in self._shares.others:
            self._words.send(own_3C, rank, action.kind)

    def _receive_statistics(self, action: Action) -> None:
        statistics = self._scored[action.microbatch].statistics
        own_3C = arrived(statistics[self._shares.rank])
        for rank in self._shares.others:
            shape, dtype = tuple(own_3C.shape), own_3C.dtype
            statistics[rank] = self._words.receive(shape, dtype, rank, Kind.SEND_STATISTICS)

    def _settle(self, scored: _Scored) -> _Settled:
        """Waits for all statistics."""
        if scored.settled is None:
            of_ranks = [arrived(scored.statistics[rank]) for rank in sorted(scored.statistics)]
            parts = [Statistics(*of_rank) for of_rank in of_ranks]
            whole = Statistics.merged(parts)
            scored.settled = _Settled(parts, whole, self._scale_of(whole.loss))
            if self._is_last:
                self._seen(whole.loss)
        return scored.settled

    def _scale_of(self, loss: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = loss.detach().requires_grad_()
            return torch.autograd.grad(self._scaled(leaf), leaf)[0]

    # T

    @torch.no_grad()
    def _score_backward(self, action: Action) -> None:
        scored = self._scored[action.microbatch]
        grad_CV = self._take_logits_gradient(scored)

        def run() -> None:
            scored.terms[self._shares.rank] = grad_CV @ self._weight.to(grad_CV.dtype)

        self._words.run(run, self._weight)
        self._add_to_weight(grad_CV, scored)
        if self._is_last:  # others send the term first
            self._release(action.microbatch)
        self._words.finished(action)

    @torch.no_grad()
    def _score_weight(self, action: Action) -> None:
        scored = self._scored[action.microbatch]
        self._add_to_weight(self._take_logits_gradient(scored), scored)
        self._release(action.microbatch)
        self._words.finished(action)

    def _loss(self, action: Action) -> None:
        self._settle(self._scored[action.microbatch])
        self._release(action.microbatch)

    def _take_logits_gradient(self, scored: _Scored) -> Tensor:
        """The gradient of what backward runs on, in place of the exponentials."""
        parts, whole, scale = self._settle(scored)
        exps_CV = scored.exps_CV.to(whole.total_C.dtype)
        scored.exps_CV = exps_CV[:0]
        here, own = parts[self._shares.rank], self._shares.own
        grad_CV = logits_gradient(exps_CV, here, whole, scored.labels_C, own)
        return grad_CV.mul_(scale).to(scored.rows_CD.dtype)

    def _add_to_weight(self, grad_CV: Tensor, scored: _Scored) -> None:
        weight_VD = self._weight
        if weight_VD.requires_grad:
            weight_VD.grad = add_product(weight_VD.grad, grad_CV.T, scored.rows_CD, weight_VD.dtype)
            self._words.on_ready(weight_VD)

    def _release(self, microbatch: int) -> None:
        """A pass is over that needed a micro-batch's scores."""
        scored = self._scored[microbatch]
        scored.num_uses -= 1
        if not scored.num_uses:
            del self._scored[microbatch]

    # Terms of the gradient of hidden states

    def _send_term(self, action: Action) -> None:
        term_ND = arrived(self._scored[action.microbatch].terms.pop(self._shares.rank))
        self._words.send(term_ND, self._words.last, action.kind)
        if self._num_barriers == 2:  # else T comes after
            self._release(action.microbatch)

    def _receive_term(self, action: Action) -> None:
        scored = self._scored[action.microbatch]
        num_rows, width = scored.rows_CD.shape
        for rank in self._shares.others:
            labels = len(self._shares.places(scored.labels_C, rank)) * (self._num_barriers == 1)
            shape, dtype = (num_rows + labels, width), scored.rows_CD.dtype
            scored.terms[rank] = self._words.receive(shape, dtype, rank, Kind.SEND_TERM)

    @torch.no_grad()
    def hidden_gradient(self, microbatch: int) -> Tensor:
        """The gradient of the last stage's output, of all ranks' terms."""
        scored = self._scored[microbatch]
        ranks = sorted(scored.terms)
        terms = [arrived(scored.terms[rank]) for rank in ranks]
        if self._num_barriers == 1:
            grad_CD = self._scaled_terms(scored, dict(zip(ranks, terms, strict=True)))
        else:
            grad_CD = sum_of(terms)
        grad_RD = scored.rows_RD.new_zeros(scored.rows_RD.shape)
        grad_RD[scored.is_valid_R] = grad_CD.to(grad_RD.dtype)
        self._release(microbatch)
        return torch.autograd.grad(scored.rows_RD, scored.hidden_BTD, grad_RD)[0]

    def _scaled_terms(self, scored: _Scored, terms: Mapping[int, Tensor]) -> Tensor:
        """The sum of terms that knew their own statistics alone, less the labels' rows."""
        parts, whole, scale = self._settle(scored)
        num_rows = len(scored.labels_C)
        total_CD = sum_of(
            term[:num_rows].to(whole.total_C.dtype) * whole.scale_of(parts[rank])[:, None]
            for rank, term in terms.items()
        )
        for rank, term in terms.items():
            total_CD[self._shares.places(scored.labels_C, rank)] -= term[num_rows:]
        return total_CD * scale

    def finish(self) -> None:
        """Asserts that nothing is left of a step."""
        left = (self._hidden, self._scored)
        assert not any(left), f"nobody has taken {[list(found) for found in left]}"
