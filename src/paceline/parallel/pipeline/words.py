"""Which words each rank of a pipeline has, and what the passes of a rank's words work with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from paceline.dist.p2p import PendingTensor, PointToPoint
from paceline.models.decoder import Decoder
from paceline.models.vocabulary import WholeVocabulary
from paceline.parallel.cut import cut_parameter
from paceline.parallel.pipeline.base import Action, Costs, Kind, Line
from paceline.parallel.pipeline.runtime import Border
from paceline.plan.layout import Box, Place
from paceline.plan.tensor_rules import even_share

PURPOSES: Mapping[Kind, str] = {
    Kind.SEND_ROWS: "embedded rows",
    Kind.SEND_ROW_GRADIENTS: "gradients of embedded rows",
    Kind.SEND_HIDDEN: "hidden states",
    Kind.SEND_STATISTICS: "statistics of logits",
    Kind.SEND_TERM: "terms of hidden states' gradients",
}
"""What ranks send each other for the vocabulary, by the kind of the sends."""

_OF_WORDS = ("embedding.weight", "head.weight")


class SpreadVocabulary(WholeVocabulary):
    """The vocabulary of a decoder whose two ends are passes of their own."""

    is_apart = True


@dataclass(frozen=True, slots=True)
class Shares:
    """Which words each rank has.

    Attributes:
        of_rank: the words of each rank on the pipeline's axis.
        rank: this one.
    """

    of_rank: tuple[range, ...]
    rank: int

    @classmethod
    def of(cls, vocab_size: int, degree: int, rank: int) -> Shares:
        """Shares as even as can be."""
        words = (even_share(vocab_size, degree, other) for other in range(degree))
        return cls(tuple(words), rank)

    @property
    def own(self) -> range:
        """The words that are here."""
        return self.of_rank[self.rank]

    @property
    def others(self) -> list[int]:
        """The other ranks."""
        return [rank for rank in range(len(self.of_rank)) if rank != self.rank]

    def places(self, words: Tensor, rank: int) -> Tensor:
        """Where among some words, laid end to end, those of a rank are."""
        theirs, flat = self.of_rank[rank], words.flatten()
        return ((flat >= theirs.start) & (flat < theirs.stop)).nonzero()[:, 0]


def spread_words(model: Decoder, shares: Shares) -> dict[str, Place]:
    """Leaves a decoder of the meta device this rank's words, in place.

    Returns:
        Where this rank's rows of the matrices of words lie.
    """
    model.vocabulary = SpreadVocabulary()
    places: dict[str, Place] = {}
    for name, parameter in list(model.named_parameters()):
        if name in _OF_WORDS:
            shape = tuple(parameter.shape)
            box = Box.of_whole(shape).narrowed(0, shares.own)
            places[name] = Place(shape, box, box)
            cut_parameter(model, name, places[name])
    return places


@dataclass(frozen=True, slots=True)
class Spread:
    """How a decoder's words are spread over the ranks of its pipeline.

    Attributes:
        model: this rank's part of the decoder.
        shares: the words of each rank.
        num_barriers: how often a micro-batch waits for all ranks.
        costs: of the passes of a stage, and of a rank's words.
        run: runs a pass that reads the values of a matrix of words.
    """

    model: Decoder
    shares: Shares
    num_barriers: int
    costs: Costs
    run: Callable[[Callable[[], None], nn.Parameter], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Words:
    """A rank's words, and what is around their passes.

    Attributes:
        model: this rank's part of the decoder.
        shares: the words of each rank.
        line: the pipeline's stages and shares.
        peers: the other ranks, for `PURPOSES`.
        border: shape and dtype of hidden states.
        call: calls the objective with a model and a micro-batch.
        run: runs a pass that reads the values of a matrix of words.
        on_ready: is told of each matrix whose gradient a pass has added to.
        finished: is called after each pass that may have.
    """

    model: Decoder
    shares: Shares
    line: Line
    peers: PointToPoint
    border: Callable[[], Border]
    call: Callable[[Any, int], Tensor]
    run: Callable[[Callable[[], None], nn.Parameter], None]
    on_ready: Callable[[Tensor], None]
    finished: Callable[[Action], None]

    @property
    def first(self) -> int:
        """The rank of the first stage."""
        return self.line.ranks[0]

    @property
    def last(self) -> int:
        """The rank of the last stage."""
        return self.line.ranks[self.line.last]

    def send(self, tensor: Tensor, rank: int, kind: Kind) -> None:
        """Begins to send a tensor; an empty one is not sent."""
        if tensor.numel():
            self.peers.send(tensor, rank, PURPOSES[kind])

    def receive(
        self, shape: tuple[int, ...], dtype: torch.dtype, rank: int, kind: Kind
    ) -> PendingTensor | Tensor:
        """Makes room for what a rank sends by actions of a kind."""
        if 0 in shape:
            return torch.empty(shape, dtype=dtype, device=self.peers.world.device)
        return self.peers.receive(shape, dtype, rank, PURPOSES[kind])


def arrived(tensor: Tensor | PendingTensor) -> Tensor:
    """A tensor, once it is here."""
    return tensor.wait() if isinstance(tensor, PendingTensor) else tensor
