"""The embedding's passes of a rank's words: E looks tokens up, EW adds to the gradient."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from paceline.dist.p2p import PendingTensor
from paceline.models.decoder import Decoder
from paceline.models.layout import Layout
from paceline.models.tied import AddedRows
from paceline.models.vocabulary import Head, logits
from paceline.parallel.pipeline.base import Action, Kind
from paceline.parallel.pipeline.runtime import Handler
from paceline.parallel.pipeline.words import Shares, Words, arrived

_Rows = dict[int, Tensor | PendingTensor]


class _Embedder:
    """Called as a model, gives the rows of the tokens whose words are here, (n, D).

    Attributes:
        tokens_BT: that it was called with.
    """

    def __init__(self, model: Decoder, shares: Shares) -> None:
        self._model, self._shares = model, shares
        self.tokens_BT = torch.empty(0)

    def __call__(
        self, tokens_BT: Tensor, layout: Layout | None = None, *, head: Head = logits
    ) -> Tensor:
        del layout, head
        self.tokens_BT = tokens_BT
        places_n = self._shares.places(tokens_BT, self._shares.rank)
        here_1n = tokens_BT.flatten()[places_n][None] - self._shares.own.start
        return self._model.embed(here_1n, AddedRows(self._model.embedding.weight))[0]


class SpreadEmbedding:
    """Runs the embedding's passes.

    Rows go from whom has their words to the first stage, and their gradients back. Both ends know
    from the tokens how many they are.

    Args:
        words: of this rank.
    """

    def __init__(self, words: Words) -> None:
        self._words, self._shares = words, words.shares
        self._tokens: dict[int, Tensor] = {}
        self._graphs: dict[int, Tensor] = {}
        self._rows: dict[int, _Rows] = {}
        self._gradients: dict[int, _Rows] = {}
        self.handlers: Mapping[Kind, Handler] = {
            Kind.EMBED: self._embed,
            Kind.SEND_ROWS: self._send_rows,
            Kind.RECEIVE_ROWS: self._receive_rows,
            Kind.SEND_ROW_GRADIENTS: self._send_gradients,
            Kind.RECEIVE_ROW_GRADIENTS: self._receive_gradients,
            Kind.EMBED_WEIGHT: self._embed_weight,
        }

    def _embed(self, action: Action) -> None:
        weight_VD = self._words.model.embedding.weight
        assert isinstance(weight_VD, nn.Parameter)
        self._words.run(lambda: self._look_up(action.microbatch), weight_VD)

    def _look_up(self, microbatch: int) -> None:
        embedder = _Embedder(self._words.model, self._shares)
        rows_nD = self._words.call(embedder, microbatch)
        self._rows[microbatch] = {self._shares.rank: rows_nD.detach()}
        is_first = self._shares.rank == self._words.first
        if torch.is_grad_enabled():
            self._graphs[microbatch] = rows_nD
        if torch.is_grad_enabled() or is_first:
            self._tokens[microbatch] = embedder.tokens_BT

    def _send_rows(self, action: Action) -> None:
        rows_nD = arrived(self._rows.pop(action.microbatch)[self._shares.rank])
        self._words.send(rows_nD, self._words.first, action.kind)

    def _receive_rows(self, action: Action) -> None:
        for rank in self._shares.others:
            found = self._receive(action.microbatch, rank, rank, Kind.SEND_ROWS)
            self._rows[action.microbatch][rank] = found

    def join(self, microbatch: int) -> Tensor:
        """Embedded tokens, (B, T, D), of all ranks' rows."""
        border, found = self._words.border(), self._rows.pop(microbatch)
        tokens_BT = self._tokens[microbatch]
        if not torch.is_grad_enabled():
            del self._tokens[microbatch]
        x_ND = torch.empty(border.shape, dtype=border.dtype, device=tokens_BT.device).flatten(0, 1)
        for rank, rows_nD in found.items():
            x_ND[self._shares.places(tokens_BT, rank)] = arrived(rows_nD)
        return x_ND.view(border.shape)

    def deal(self, microbatch: int, grad_BTD: Tensor) -> None:
        """Takes the gradient of embedded tokens apart, to whom has their words."""
        tokens_BT, grad_ND = self._tokens[microbatch], grad_BTD.flatten(0, 1)
        self._gradients[microbatch] = {
            rank: grad_ND[self._shares.places(tokens_BT, rank)]
            for rank in range(len(self._shares.of_rank))
        }

    def _send_gradients(self, action: Action) -> None:
        for rank in self._shares.others:
            rows_nD = arrived(self._gradients[action.microbatch].pop(rank))
            self._words.send(rows_nD, rank, action.kind)

    def _receive_gradients(self, action: Action) -> None:
        own, source = self._shares.rank, self._words.first
        found = self._receive(action.microbatch, own, source, Kind.SEND_ROW_GRADIENTS)
        self._gradients[action.microbatch] = {own: found}

    def _embed_weight(self, action: Action) -> None:
        (gradient,) = self._gradients.pop(action.microbatch).values()
        rows_nD = self._graphs.pop(action.microbatch)
        del self._tokens[action.microbatch]
        if rows_nD.requires_grad:
            rows_nD.backward(arrived(gradient))
            self._words.on_ready(self._words.model.embedding.weight)
        self._words.finished(action)

    def _receive(
        self, microbatch: int, words_of: int, source: int, kind: Kind
    ) -> Tensor | PendingTensor:
        """Rows, or their gradients, of the tokens whose words a rank has."""
        count = len(self._shares.places(self._tokens[microbatch], words_of))
        border = self._words.border()
        return self._words.receive((count, border.shape[-1]), border.dtype, source, kind)

    def finish(self) -> None:
        """Asserts that nothing is left of a step."""
        left = (self._tokens, self._graphs, self._rows, self._gradients)
        assert not any(left), f"nobody has taken {[list(found) for found in left]}"
