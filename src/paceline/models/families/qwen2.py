"""Qwen 2 and 2.5 (Yang et al., arXiv:2407.10671): Llama with biases on queries, keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from paceline.models.families import llama
from paceline.models.families.base import read_common, read_windows, write_common, write_windows
from paceline.plan.model_spec import ModelSpec

PRESETS = llama.little(family="qwen2", qkv_bias=True) | {
    "0.5b": ModelSpec(
        family="qwen2",
        vocab_size=151936,
        d_model=896,
        num_layers=24,
        num_heads=14,
        num_kv_heads=2,
        head_dim=64,
        d_ffn=4864,
        max_positions=131072,
        rope_theta=1e6,
        norm_eps=1e-6,
        tied_embeddings=True,
        qkv_bias=True,
    )
}

weight_map = llama.weight_map


def spec_from_config(config: Mapping[str, Any]) -> ModelSpec:
    windows = read_windows({"use_sliding_window": False, **config})
    return ModelSpec(family="qwen2", qkv_bias=True, **windows, **read_common(config))


def config_from_spec(spec: ModelSpec) -> dict[str, Any]:
    return write_common(spec, "qwen2", "Qwen2ForCausalLM") | write_windows(spec)
