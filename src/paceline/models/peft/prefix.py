"""Prefix tuning: keys and values of virtual tokens are trained, in every layer.

Source: Li and Liang, Prefix-Tuning: Optimizing Continuous Prompts for Generation, arXiv:2101.00190,
    Sec. 4.2.
Replaces: none.  Needs: sequence_length + virtual_tokens <= the model's context.
Forbids: train.freeze; merging.
Cost: 2 x num_layers x virtual_tokens x d_kv parameters; every row is virtual_tokens longer.
Differs: keys are used as they are, neither normed nor rotated, and no network makes them
    (Sec. 4.3), as in `peft` without a projection; they begin normal with standard deviation 0.02.
"""

# ruff: noqa: ARG002 (arguments are the contract's)
from __future__ import annotations

from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from paceline.core import rng
from paceline.models.attention import Attend, AttentionSite
from paceline.models.decoder import Decoder
from paceline.models.layout import Layout
from paceline.models.peft.base import Method, Origin
from paceline.models.peft.names import FileNames
from paceline.models.peft.options import FileOptions
from paceline.models.peft.prompt import prelude_fields, read_prelude_fields
from paceline.models.prelude import Prelude

_START_STD = 0.02


class PrefixPrelude(Prelude):
    """Virtual tokens without content: all that is seen of them are their keys and values.

    Args:
        states_PL2KH: keys and values of each layer.
    """

    def __init__(self, states_PL2KH: nn.Parameter) -> None:
        super().__init__()
        self.num_tokens = states_PL2KH.shape[0]
        self.states = states_PL2KH

    def forward(
        self, x_BTD: Tensor, layout: Layout, attend: Attend
    ) -> tuple[Tensor, Layout, Attend]:
        front_BPD = x_BTD.new_zeros(len(x_BTD), self.num_tokens, x_BTD.shape[2])
        x_BTD = torch.cat([front_BPD, x_BTD], dim=1)
        return x_BTD, layout.behind(self.num_tokens), _WithPrefix(attend, self.states)


class _WithPrefix:
    """An attention core that sees trained keys and values in place of the virtual tokens'.

    Args:
        attend: the core that is given them.
        states_PL2KH: keys and values of each layer.
    """

    def __init__(self, attend: Attend, states_PL2KH: Tensor) -> None:
        self._attend = attend
        self._states_PL2KH = states_PL2KH

    def __call__(
        self, q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, *, layout: Layout, site: AttentionSite
    ) -> Tensor:
        k_BPKH, v_BPKH = (
            self._states_PL2KH[:, site.layer, which]
            .to(k_BTKH.dtype)
            .expand(len(k_BTKH), -1, -1, -1)
            for which in (0, 1)
        )
        k_BTKH = torch.cat([k_BPKH, k_BTKH[:, layout.num_shared :]], dim=1)
        v_BTKH = torch.cat([v_BPKH, v_BTKH[:, layout.num_shared :]], dim=1)
        return self._attend(q_BTNH, k_BTKH, v_BTKH, layout=layout, site=site)


class Prefix(Method):
    """Trained keys and values."""

    file_type = "PREFIX_TUNING"
    why_unmerged = "virtual tokens stand before the text, not in the model's weights"
    why_alone = "virtual tokens stand before the sequences of a pass, and before all alike"

    def attach(self, model: Decoder) -> None:
        spec = model.spec
        shape = (self.config.virtual_tokens, spec.num_layers, 2, spec.num_kv_heads, spec.head_dim)
        model.prelude = PrefixPrelude(nn.Parameter(model.embedding.weight.new_empty(shape)))

    def start(self, name: str, shape: tuple[int, ...], origin: Origin) -> Tensor:
        draws = rng.normal(int(np.prod(shape)), seed=origin.seed, purpose="adapter", stream=name)
        return torch.from_numpy((draws * _START_STD).astype(np.float32)).view(shape)

    def file_key(self, name: str, names: FileNames) -> str:
        return "prompt_embeddings"

    def file_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (shape[0], int(np.prod(shape[1:])))

    def file_config(self, names: FileNames, targets: list[str]) -> dict[str, Any]:
        spec = names.spec
        fields = prelude_fields(self.config, spec, spec.num_kv_heads, spec.d_kv)
        return fields | {"prefix_projection": False}

    @classmethod
    def from_file(cls, options: FileOptions, names: FileNames) -> Self:
        spec = names.spec
        options.require_model("num_attention_heads", spec.num_kv_heads)
        options.ignore("encoder_hidden_size")  # of the projection, which `refuse_rest` refuses
        return cls(read_prelude_fields("prefix", options, spec, spec.d_kv))
