"""Prompt tuning: the embeddings of virtual tokens before every document are trained.

Source: Lester et al., The Power of Scale for Parameter-Efficient Prompt Tuning, arXiv:2104.08691,
    Sec. 2.
Replaces: none.  Needs: sequence_length + virtual_tokens <= the model's context.
Forbids: train.freeze; merging.
Cost: virtual_tokens x d_model parameters; every row is virtual_tokens longer.
Differs: embeddings begin as those of tokens drawn from the vocabulary, all alike likely.
"""

# ruff: noqa: ARG002 (arguments are the contract's)
from __future__ import annotations

from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from paceline.core import rng
from paceline.models.attention import Attend
from paceline.models.decoder import Decoder
from paceline.models.layout import Layout
from paceline.models.peft.base import Method, Origin
from paceline.models.peft.names import FileNames
from paceline.models.peft.options import FileOptions
from paceline.models.prelude import Prelude
from paceline.plan.model_spec import ModelSpec
from paceline.plan.plan import PeftConfig


class PromptPrelude(Prelude):
    """Virtual tokens with embeddings of their own, (P, D)."""

    def __init__(self, embeddings_PD: nn.Parameter) -> None:
        super().__init__()
        self.num_tokens = embeddings_PD.shape[0]
        self.embeddings = embeddings_PD

    def forward(
        self, x_BTD: Tensor, layout: Layout, attend: Attend
    ) -> tuple[Tensor, Layout, Attend]:
        front_BPD = self.embeddings.to(x_BTD.dtype).expand(len(x_BTD), -1, -1)
        return torch.cat([front_BPD, x_BTD], dim=1), layout.behind(self.num_tokens), attend


class Prompt(Method):
    """Soft prompts."""

    file_type = "PROMPT_TUNING"
    why_unmerged = "virtual tokens stand before the text, not in the model's weights"
    why_alone = "virtual tokens stand before the sequences of a pass, and before all alike"

    def attach(self, model: Decoder) -> None:
        shape = (self.config.virtual_tokens, model.spec.d_model)
        model.prelude = PromptPrelude(nn.Parameter(model.embedding.weight.new_empty(shape)))

    def start(self, name: str, shape: tuple[int, ...], origin: Origin) -> Tensor:
        embedding_VD = origin.weights.read("embedding.weight")
        draws = rng.bits(shape[0], seed=origin.seed, purpose="adapter", stream=name)
        tokens = (draws % np.uint64(len(embedding_VD))).astype(np.int64)
        return embedding_VD[torch.from_numpy(tokens)] * origin.spec.embedding_scale

    def file_key(self, name: str, names: FileNames) -> str:
        return "prompt_embeddings"

    def file_config(self, names: FileNames, targets: list[str]) -> dict[str, Any]:
        return prelude_fields(self.config, names.spec, names.spec.num_heads, names.spec.d_model)

    @classmethod
    def from_file(cls, options: FileOptions, names: FileNames) -> Self:
        options.ignore("prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path")
        options.ignore("tokenizer_kwargs", "num_attention_heads")
        return cls(read_prelude_fields("prompt", options, names.spec, names.spec.d_model))


def prelude_fields(
    config: PeftConfig, spec: ModelSpec, num_heads: int, width: int
) -> dict[str, Any]:
    """The options of files of virtual tokens."""
    return {
        "num_virtual_tokens": config.virtual_tokens,
        "num_layers": spec.num_layers,
        "num_attention_heads": num_heads,
        "token_dim": width,
        "num_transformer_submodules": 1,
    }


def read_prelude_fields(
    method: str, options: FileOptions, spec: ModelSpec, width: int
) -> PeftConfig:
    """What `prelude_fields` writes."""
    options.require_model("num_layers", spec.num_layers)
    options.require_model("token_dim", width)
    options.require("num_transformer_submodules", 1)
    return PeftConfig(method=method, virtual_tokens=options.take_int("num_virtual_tokens"))
