"""Attention over keys and values that lie in blocks, of the tokens of many sequences at once.

On a CPU it is one call of a C kernel for all sequences, which reads each key and value once for all
the queries that share it. A query's sums are in an order of its own positions alone, in splits of
`SPLIT` keys, so that its result is the same bit by bit whatever is computed beside it, and however
its sequence is cut into passes. Elsewhere, and where gradients are wanted, it is a call of torch's
fused kernel for each sequence.

Source: Kwon et al., arXiv:2309.06180, Sec. 4.3; splits as in Flash-Decoding (Dao et al., 2023).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from paceline.kernels import native
from paceline.kernels.attend import scaled_dot_product

SPLIT = 256
"""Keys to a split, as in the C source; a multiple of a block's tokens."""


class Laid(NamedTuple):
    """The rows of a pass as arrays in int32, on the CPU.

    Attributes:
        tables_BM: of each sequence, its blocks; what is beyond its last is 0.
        starts: of each sequence, its first token in the pass; one more at the end.
        num_before: of each sequence.
    """

    tables_BM: Tensor
    starts: Tensor
    num_before: Tensor


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

    def laid(self) -> Laid:
        """These rows as arrays."""
        tables_BM = np.zeros((len(self.tables), max(map(len, self.tables))), dtype=np.int32)
        for row_M, table in zip(tables_BM, self.tables, strict=True):
            row_M[: len(table)] = table.numpy()
        starts, num_before = (np.array(x, dtype=np.int32) for x in (self.starts, self.num_before))
        return Laid(*map(torch.from_numpy, (tables_BM, starts, num_before)))

    def places_T(self, block_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Block, and slot in it, of each token of the pass."""
        laid = self.laid()
        lengths = laid.starts.diff()
        sequence_T = torch.arange(len(lengths)).repeat_interleave(lengths)
        shift = laid.num_before - laid.starts[:-1]
        positions_T = torch.arange(self.starts[-1]) + shift[sequence_T]
        blocks_T = laid.tables_BM[sequence_T, positions_T // block_size]
        return blocks_T.to(device), (positions_T % block_size).to(device)


def takes_paged(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, k_MKSH: Tensor) -> bool:
    """Whether the C kernel can compute on these."""
    for x in (q_TNH, k_TKH, v_TKH):
        is_of_heads = x.stride()[1:] == (x.shape[2], 1)
        if x.device.type != "cpu" or x.dtype != k_MKSH.dtype or not is_of_heads:
            return False
    return SPLIT % k_MKSH.shape[2] == 0 and native.takes(k_MKSH)


def keep_and_attend(
    q_TNH: Tensor,
    k_TKH: Tensor,
    v_TKH: Tensor,
    k_MKSH: Tensor,
    v_MKSH: Tensor,
    laid: Laid,
    *,
    window: int | None,
    scale: float,
) -> Tensor:
    """`attend_paged` by the C kernel, which first puts new keys and values into their blocks.

    Args:
        q_TNH: queries of all sequences, one after the other.
        k_TKH: their keys.
        v_TKH: their values.
        k_MKSH: keys of all blocks.
        v_MKSH: values of all blocks.
        laid: which tokens and blocks belong together.
        window: tokens that a query sees, its own among them; None for all.
        scale: of the scores.

    Returns:
        out_TNH.
    """
    out_TNH = torch.empty(q_TNH.shape, dtype=q_TNH.dtype)
    num_heads, head_dim = q_TNH.shape[1:]
    num_kv_heads, block_size = k_MKSH.shape[1:3]
    num_sequences, table_width = laid.tables_BM.shape
    native.call(
        "attend_paged",
        q_TNH.dtype,
        *(q_TNH, k_TKH, v_TKH, out_TNH, k_MKSH, v_MKSH, *laid),
        *(table_width, num_sequences, num_heads, num_kv_heads, block_size, head_dim),
        *(x.stride(0) for x in (q_TNH, k_TKH, v_TKH)),
        window or 0,
        scale,
        torch.get_num_threads(),
    )
    return out_TNH


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
