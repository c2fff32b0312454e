"""The two ends of a decoder, where tokens come in and predictions go out: the seam of their layout.

Between the ends, blocks take the residual stream in whatever layout the ends give it. The plain
one is (B, T, D) and every word of the vocabulary is here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from paceline.kernels.cross_entropy import linear_cross_entropy
from paceline.kernels.linear import linear
from paceline.models.layout import Layout


class Vocabulary(Protocol):
    """How words are looked up and predicted.

    Attributes:
        is_apart: whether both ends are passes of their own, so that blocks begin and end with
            hidden states.
    """

    @property
    def is_apart(self) -> bool: ...

    def embed(self, tokens_BT: Tensor, look_up: Callable[[Tensor], Tensor]) -> Tensor:
        """The tokens' embeddings, as blocks take them.

        Args:
            tokens_BT: ids of the whole vocabulary.
            look_up: gives rows of the embedding that is here, (B, T, D), in the compute dtype.
        """
        ...

    def spread(self, x_BTD: Tensor) -> Tensor:
        """What is the same everywhere, as blocks take it."""
        ...

    def collect(self, x_BTD: Tensor, layout: Layout) -> Tensor:
        """Hidden states as blocks leave them, as the head takes them: (B, T, D)."""
        ...

    def logits(self, x_BTD: Tensor, weight_VD: Tensor) -> Tensor:
        """Of all words, in the dtype of x. The weight is of the words that are here."""
        ...

    def cross_entropy(
        self, x_RD: Tensor, weight_VD: Tensor, labels_R: Tensor, *, ignored: int
    ) -> Tensor:
        """The sum of ``-log p(label)`` over the rows whose label is not `ignored`."""
        ...


class WholeVocabulary:
    """Every word is here."""

    is_apart = False

    def embed(self, tokens_BT: Tensor, look_up: Callable[[Tensor], Tensor]) -> Tensor:
        return look_up(tokens_BT)

    def spread(self, x_BTD: Tensor) -> Tensor:
        return x_BTD

    def collect(self, x_BTD: Tensor, layout: Layout) -> Tensor:
        del layout
        return x_BTD

    def logits(self, x_BTD: Tensor, weight_VD: Tensor) -> Tensor:
        return linear(x_BTD, weight_VD.to(x_BTD.dtype))

    def cross_entropy(
        self, x_RD: Tensor, weight_VD: Tensor, labels_R: Tensor, *, ignored: int
    ) -> Tensor:
        return linear_cross_entropy(x_RD, weight_VD, labels_R, ignored=ignored)


@dataclass(frozen=True, slots=True)
class Output:
    """What a head predicts with.

    Attributes:
        vocabulary: how.
        weight_VD: of the words that are here.
    """

    vocabulary: Vocabulary
    weight_VD: Tensor

    def logits(self, x_BTD: Tensor) -> Tensor:
        """Of the next token at every position, (B, T, V), in the dtype of x."""
        return self.vocabulary.logits(x_BTD, self.weight_VD)

    def cross_entropy(self, x_BTD: Tensor, labels_BT: Tensor, *, ignored: int) -> Tensor:
        """The sum of ``-log p(label)`` over the labels that are not `ignored`."""
        rows_RD, labels_R = x_BTD.flatten(0, 1), labels_BT.flatten()
        return self.vocabulary.cross_entropy(rows_RD, self.weight_VD, labels_R, ignored=ignored)


class Head(Protocol):
    """What becomes of the last hidden states: logits, or a loss that never holds them all.

    Args:
        x_BTD: after the last norm, in the compute dtype.
        output: the projection onto the vocabulary.
    """

    def __call__(self, x_BTD: Tensor, output: Output) -> Tensor: ...


def logits(x_BTD: Tensor, output: Output) -> Tensor:
    """The head that gives logits."""
    return output.logits(x_BTD)
