"""Attention over keys and values that lie in blocks, of the tokens of many sequences at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from paceline.kernels.attend import scaled_dot_product


@dataclass(frozen=True, slots=True)
class Rows:
    """Which tokens of a pass belong to which sequence, and where its keys and values lie.

    Attributes:
        starts: of each sequence, its first token among those of the pass; one more at the end.
        num_before: of each sequence, tokens that it has before this pass.
        tables: of each sequence, its blocks, (M,) int32, for all tokens up to this pass's last.
    """

    starts: Sequence[int]
    num_before: Sequence[int]
    tables: Sequence[Tensor]

    def places_T(self, block_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Block, and slot in it, of each token of the pass."""
        blocks: list[Tensor] = []
        slots: list[Tensor] = []
        for index, table in enumerate(self.tables):
            num_new = self.starts[index + 1] - self.starts[index]
            positions = torch.arange(self.num_before[index], self.num_before[index] + num_new)
            blocks.append(table[positions // block_size])
            slots.append(positions % block_size)
        return torch.cat(blocks).to(device), torch.cat(slots).to(device)


def attend_paged(
    q_TNH: Tensor,
    k_MKSH: Tensor,
    v_MKSH: Tensor,
    rows: Rows,
    *,
    window: int | None,
    scale: float,
) -> Tensor:
    """Each token's attention over its own sequence, itself and what is before it.

    Args:
        q_TNH: queries of all sequences, one after the other.
        k_MKSH: keys of all blocks: M blocks, K heads, S tokens; those of this pass among them.
        v_MKSH: values likewise.
        rows: which queries and blocks belong together.
        window: tokens that a query sees, its own among them; None for all.
        scale: of the scores.

    Returns:
        out_TNH.
    """
    parts = [
        _one_sequence(
            q_TNH[rows.starts[index] : rows.starts[index + 1]],
            k_MKSH,
            v_MKSH,
            table,
            rows.num_before[index],
            window,
            scale,
        )
        for index, table in enumerate(rows.tables)
    ]
    return torch.cat(parts)


def _one_sequence(
    q_TNH: Tensor,
    k_MKSH: Tensor,
    v_MKSH: Tensor,
    table: Tensor,
    num_before: int,
    window: int | None,
    scale: float,
) -> Tensor:
    num_new, num_tokens = len(q_TNH), num_before + len(q_TNH)
    block_size = k_MKSH.shape[2]
    first = 0 if window is None else max(0, num_before + 1 - window)
    first_block, last_block = first // block_size, -(-num_tokens // block_size)
    used = table[first_block:last_block].to(q_TNH.device)
    begin = first_block * block_size

    def gathered(x_MKSH: Tensor) -> Tensor:
        x_SKH = x_MKSH[used].transpose(1, 2).flatten(0, 1)
        return x_SKH[first - begin : num_tokens - begin][None]

    mask_TS = causal_mask_TS(num_before - first, num_new, window, q_TNH.device)
    out_1TNH = scaled_dot_product(
        q_TNH[None],
        gathered(k_MKSH),
        gathered(v_MKSH),
        mask_TS,
        is_causal=mask_TS is None and num_new > 1,
        scale=scale,
    )
    return out_1TNH[0]


def causal_mask_TS(
    num_before: int, num_new: int, window: int | None, device: torch.device
) -> Tensor | None:
    """Which keys each new token sees; None where it is all of them, or a plain causal square.

    Args:
        num_before: keys before the first new token.
        num_new: new tokens, whose keys come last.
        window: tokens that a query sees, its own among them.
        device: of the mask.
    """
    is_wide = window is None or window >= num_before + num_new
    if num_new == 1 or (num_before == 0 and is_wide):
        return None
    mask_TS = torch.ones(num_new, num_before + num_new, dtype=torch.bool, device=device)
    mask_TS = mask_TS.tril(num_before)
    return mask_TS if window is None else mask_TS.triu(num_before + 1 - window)
