"""Mistral (Jiang et al., arXiv:2310.06825): Llama with a window in every layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from paceline.models.families import llama
from paceline.models.families.base import read_common, write_common
from paceline.plan.model_spec import ModelSpec

PRESETS = llama.little(family="mistral", window=24, tied_embeddings=False) | {
    "7b": ModelSpec(  # version 0.1
        family="mistral",
        vocab_size=32000,
        d_model=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        d_ffn=14336,
        max_positions=32768,
        window=4096,
    )
}

weight_map = llama.weight_map


def spec_from_config(config: Mapping[str, Any]) -> ModelSpec:
    return ModelSpec(family="mistral", window=config.get("sliding_window"), **read_common(config))


def config_from_spec(spec: ModelSpec) -> dict[str, Any]:
    return write_common(spec, "mistral", "MistralForCausalLM") | {"sliding_window": spec.window}
