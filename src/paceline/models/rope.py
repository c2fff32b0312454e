"""Rotary position embedding.

Source: Su et al., RoFormer, arXiv:2104.09864, Eq. 34; the halves of a head are rotated against
each other, as in GPT-NeoX and in the weights that Hugging Face holds.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from paceline.plan.model_spec import RopeScaling


def rotary_angles(
    positions_BT: Tensor,
    *,
    head_dim: int,
    theta: float,
    scaling: RopeScaling | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Cosines and sines for each position, (B, T, 1, H).

    Angles are computed in float32 whatever `dtype` is, as the models were trained.
    """
    exponents = torch.arange(0, head_dim, 2, device=positions_BT.device, dtype=torch.float32)
    frequencies = 1.0 / (theta ** (exponents / head_dim))
    if scaling is not None:
        frequencies = _stretch(frequencies, scaling)
    angles_BTh = positions_BT[..., None].float() * frequencies
    angles_BT1H = torch.cat([angles_BTh, angles_BTh], dim=-1).unsqueeze(2)
    return angles_BT1H.cos().to(dtype), angles_BT1H.sin().to(dtype)


def _stretch(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Position interpolation (Chen et al., arXiv:2306.15595), or Llama 3.1's frequency bands
    (Grattafiori et al., arXiv:2407.21783, Sec. 3.2).
    """
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    turns = scaling.original_positions * frequencies / (2 * math.pi)
    blend = (turns - scaling.low_factor) / (scaling.high_factor - scaling.low_factor)
    blend = blend.clamp(0.0, 1.0)
    return (1 - blend) * frequencies / scaling.factor + blend * frequencies
