"""Cross entropy of the next token."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from paceline.data.batch import IGNORED, Batch
from paceline.kernels.cross_entropy import linear_cross_entropy
from paceline.models.layout import Layout


def next_token(model: nn.Module, batch: Batch) -> Tensor:
    """The sum of ``-log p(label)`` over the labels that are not ignored."""
    head = partial(_loss, labels_BT=batch.labels_BT)
    return model(batch.tokens_BT, Layout.of_documents(batch.documents_BT), head=head)


def _loss(x_BTD: Tensor, weight_VD: Tensor, *, labels_BT: Tensor) -> Tensor:
    return linear_cross_entropy(
        x_BTD.flatten(0, 1), weight_VD, labels_BT.flatten(), ignored=IGNORED
    )
