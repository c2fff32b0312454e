"""Cross entropy of the next token."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from paceline.data.batch import IGNORED, Batch
from paceline.models.layout import Layout
from paceline.models.vocabulary import Output


def next_token(model: nn.Module, batch: Batch) -> Tensor:
    """The sum of ``-log p(label)`` over the labels that are not ignored."""
    head = partial(_loss, labels_BT=batch.labels_BT)
    layout = Layout.of_documents(batch.documents_BT, batch.places_T)
    return model(batch.tokens_BT, layout, head=head)


def _loss(x_BTD: Tensor, output: Output, *, labels_BT: Tensor) -> Tensor:
    return output.cross_entropy(x_BTD, labels_BT, ignored=IGNORED)
