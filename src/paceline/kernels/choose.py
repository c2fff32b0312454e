"""A token for each row of logits, many rows at once: the highest, or one drawn with Gumbel noise.

Source: Gumbel-max, as in `paceline.decode.sampler`, whose choice a drawn token is.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from paceline.kernels import native


def highest_rows(logits_RV: Tensor) -> list[int]:
    """The first of the highest of each row; not a number is higher than all."""
    if not native.takes(logits_RV):
        return logits_RV.argmax(-1).tolist()
    chosen_R = torch.empty(len(logits_RV), dtype=torch.int64)
    threads = torch.get_num_threads()
    native.call("highest", logits_RV.dtype, logits_RV, chosen_R, *logits_RV.shape, threads)
    return chosen_R.tolist()


def draw_rows(
    logits_RV: Tensor,
    temperatures: Sequence[float],
    keys: Sequence[bytes],
    positions: Sequence[int],
) -> list[int | None]:
    """The highest of ``logits / temperature + noise`` of each row.

    The kernel's noise is within 1e-12 of numpy's, whose bits it shares, and scores are the same
    numbers. Where the winner's lead is above 1e-9 of its size the choice is therefore numpy's own;
    where it is not, or nothing can be compared, the row is left to the caller.

    Args:
        logits_RV: of the model.
        temperatures: above 0, one a row.
        keys: of the noise (`paceline.core.rng.key`).
        positions: of the noise.

    Returns:
        The choices; None for what the caller has to choose.
    """
    if not native.takes(logits_RV):
        return [None] * len(logits_RV)
    chosen_R = torch.empty(len(logits_RV), dtype=torch.int64)
    temperatures_R = torch.tensor(temperatures, dtype=torch.float64)
    keys_R = torch.from_numpy(np.frombuffer(b"".join(keys), dtype="<i8").copy())
    positions_R = torch.tensor(positions, dtype=torch.int64)
    native.call(
        "draw",
        logits_RV.dtype,
        logits_RV,
        temperatures_R,
        keys_R,
        positions_R,
        chosen_R,
        *logits_RV.shape,
        torch.get_num_threads(),
    )
    return [None if token < 0 else token for token in chosen_R.tolist()]
