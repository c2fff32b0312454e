"""Keys and values of many sequences in blocks, and a pass over the next tokens of some of them.

Source: Kwon et al., Efficient Memory Management for Large Language Model Serving with
    PagedAttention, arXiv:2309.06180, Sec. 4.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from paceline.kernels.attend_paged import Rows, attend_paged, keep_and_attend, takes_paged
from paceline.models.attention import AttentionSite
from paceline.models.decoder import Decoder
from paceline.models.layout import Layout
from paceline.models.vocabulary import Head, Output, logits
from paceline.plan.model_spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Next:
    """The next tokens of a sequence.

    Attributes:
        tokens: to be computed.
        num_before: tokens before them whose keys and values are in the blocks.
        table: the sequence's blocks, (M,) int32, with room for these tokens.
    """

    tokens: Sequence[int]
    num_before: int
    table: Tensor


@dataclass(frozen=True, slots=True)
class Packed:
    """The tokens of one pass.

    Attributes:
        tokens_1T: of all sequences, one after the other.
        layout: their positions.
        rows: which of them belong to which sequence.
    """

    tokens_1T: Tensor
    layout: Layout
    rows: Rows


class PagedStore:
    """Blocks for the keys and values of every layer.

    Args:
        spec: sizes of the model.
        num_blocks: of the store.
        block_size: tokens to a block.
        dtype: of keys and values.
        device: where they are kept.
    """

    def __init__(
        self,
        spec: ModelSpec,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_blocks, self.block_size, self.device = num_blocks, block_size, device
        shape = (spec.num_layers, 2, num_blocks, spec.num_kv_heads, block_size, spec.head_dim)
        self.blocks_L2MKSH = torch.empty(shape, dtype=dtype, device=device)


class PagedPass:
    """The core of attention of one pass over the next tokens of some sequences.

    Args:
        store: of keys and values.
        rows: the pass's sequences.
    """

    def __init__(self, store: PagedStore, rows: Rows) -> None:
        self._store, self._rows = store, rows
        self._laid = rows.laid()

    def attend(
        self,
        q_BTNH: Tensor,
        k_BTKH: Tensor,
        v_BTKH: Tensor,
        *,
        layout: Layout,  # noqa: ARG002 (part of the seam)
        site: AttentionSite,
    ) -> Tensor:
        """Keeps the keys and values of all tokens and attends; B is 1."""
        k_MKSH, v_MKSH = self._store.blocks_L2MKSH[site.layer]
        new = (q_BTNH[0], k_BTKH[0], v_BTKH[0])
        sight = {"window": site.window, "scale": site.scale}
        if takes_paged(*new, k_MKSH):
            return keep_and_attend(*new, k_MKSH, v_MKSH, self._laid, **sight)[None]
        block_T, slot_T = self._places
        k_MKSH[block_T, :, slot_T] = k_BTKH[0]
        v_MKSH[block_T, :, slot_T] = v_BTKH[0]
        return attend_paged(q_BTNH[0], k_MKSH, v_MKSH, self._rows, **sight)[None]

    @cached_property
    def _places(self) -> tuple[Tensor, Tensor]:
        return self._rows.places_T(self._store.block_size, self._store.device)


def extend_all(
    model: Decoder, sequences: Sequence[Next], store: PagedStore, wanted: Sequence[int]
) -> Tensor:
    """Computes the next tokens of several sequences in one pass, and keeps their keys and values.

    Virtual tokens of a prelude come first where a sequence begins, and count as its tokens: such a
    sequence is computed in a pass of its own.

    Args:
        model: with its weights.
        sequences: what to compute.
        store: of keys and values.
        wanted: tokens whose logits are wanted, by their place among all of the pass, in order.

    Returns:
        logits_RV, one row for each that is wanted.
    """
    begins = model.num_virtual_tokens > 0 and any(s.num_before == 0 for s in sequences)
    assert not begins or len(sequences) == 1, "a prelude stands before one sequence"
    packed = pack(sequences, store.device, model.num_virtual_tokens if begins else 0)
    logits_1RV = model(
        packed.tokens_1T,
        packed.layout,
        attend=PagedPass(store, packed.rows).attend,
        is_begun=not begins,
        head=logits_of(wanted),
    )
    return logits_1RV[0]


def pack(sequences: Sequence[Next], device: torch.device, num_virtual: int = 0) -> Packed:
    """The next tokens of several sequences as one pass takes them, end to end and without padding.

    Args:
        sequences: what to compute.
        device: where.
        num_virtual: of a prelude that stands before the one sequence that there is.
    """
    lengths = np.fromiter((len(s.tokens) for s in sequences), dtype=np.int64)
    num_before = np.fromiter((s.num_before for s in sequences), dtype=np.int64)
    ends, num_own = np.cumsum(lengths + num_virtual), int(lengths.sum())
    rows = Rows([0, *ends.tolist()], num_before.tolist(), [s.table for s in sequences])
    each_token = chain.from_iterable(s.tokens for s in sequences)
    tokens_T = np.fromiter(each_token, dtype=np.int64, count=num_own)
    shift = num_before - (np.cumsum(lengths) - lengths)
    positions_T = np.arange(num_own) + np.repeat(shift, lengths)
    tokens_1T, positions_1T = (torch.from_numpy(x)[None] for x in (tokens_T, positions_T))
    return Packed(tokens_1T.to(device), Layout(positions_1T.to(device)), rows)


def logits_of(wanted: Sequence[int]) -> Head:
    """The head of the tokens whose logits are wanted, by their place among all of the pass."""

    def head(x_BTD: Tensor, output: Output) -> Tensor:
        places = torch.tensor(wanted, device=x_BTD.device, dtype=torch.long)
        return logits(x_BTD[:, places], output)

    return head
