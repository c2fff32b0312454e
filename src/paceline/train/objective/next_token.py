"""Cross entropy of the next token."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from paceline.data.batch import IGNORED, Batch
from paceline.models.layout import Layout


def next_token(model: nn.Module, batch: Batch) -> Tensor:
    """The sum of ``-log p(label)`` over the labels that are not ignored."""
    logits_BTV = model(batch.tokens_BT, Layout.of_documents(batch.documents_BT))
    wide_BTV = logits_BTV.to(torch.promote_types(logits_BTV.dtype, torch.float32))
    return functional.cross_entropy(
        wide_BTV.flatten(0, 1), batch.labels_BT.flatten(), ignore_index=IGNORED, reduction="sum"
    )
