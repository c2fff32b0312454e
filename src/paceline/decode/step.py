"""The next tokens of a sequence whose earlier ones are in a cache."""

from __future__ import annotations

import torch
from torch import Tensor

from paceline.decode.cache import KVCache
from paceline.models.decoder import Decoder
from paceline.models.layout import Layout


def extend(model: Decoder, tokens_1T: Tensor, cache: KVCache, *, last_only: bool = True) -> Tensor:
    """Computes the next tokens of a sequence and keeps their keys and values.

    A prelude's virtual tokens come first into an empty cache, and count as its tokens from then on.

    Args:
        model: with its weights.
        tokens_1T: the next tokens.
        cache: of the tokens before them.
        last_only: whether only the last token's logits are wanted.

    Returns:
        logits_11V, or logits_1TV.
    """
    start, num_tokens = cache.num_tokens, tokens_1T.shape[1]
    is_begun = start > 0
    positions_T = torch.arange(start, start + num_tokens, device=tokens_1T.device)
    logits = model(
        tokens_1T,
        Layout(positions_T[None]),
        attend=cache.attend,
        last_only=last_only,
        is_begun=is_begun,
    )
    cache.commit(num_tokens if is_begun else model.num_virtual_tokens + num_tokens)
    return logits


def num_own_tokens(model: Decoder, cache: KVCache) -> int:
    """A cache's tokens without the prelude's."""
    return max(0, cache.num_tokens - model.num_virtual_tokens)
