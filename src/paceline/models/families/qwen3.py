"""Qwen 3 (Yang et al., arXiv:2505.09388): Llama with a norm on each query and key head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from paceline.models.families import llama
from paceline.models.families.base import (
    ATTENTION,
    GATED_FFN,
    PRE_NORMS,
    QUERY_KEY_NORMS,
    Stored,
    read_common,
    read_windows,
    write_common,
    write_windows,
)
from paceline.models.families.base import weight_map as common_map
from paceline.plan.model_spec import ModelSpec

PRESETS = llama.little(family="qwen3", qk_norm="head") | {
    "0.6b": ModelSpec(
        family="qwen3",
        vocab_size=151936,
        d_model=1024,
        num_layers=28,
        num_heads=16,
        num_kv_heads=8,
        head_dim=128,
        d_ffn=3072,
        max_positions=40960,
        rope_theta=1e6,
        norm_eps=1e-6,
        qk_norm="head",
        tied_embeddings=True,
    )
}


def spec_from_config(config: Mapping[str, Any]) -> ModelSpec:
    bias = config.get("attention_bias", False)
    windows = read_windows({"use_sliding_window": False, **config})
    return ModelSpec(
        family="qwen3",
        qk_norm="head",
        qkv_bias=bias,
        output_bias=bias,
        **windows,
        **read_common(config),
    )


def config_from_spec(spec: ModelSpec) -> dict[str, Any]:
    common = write_common(spec, "qwen3", "Qwen3ForCausalLM")
    return common | write_windows(spec) | {"attention_bias": spec.qkv_bias}


def weight_map(spec: ModelSpec) -> dict[str, Stored]:
    return common_map(spec, PRE_NORMS | ATTENTION | QUERY_KEY_NORMS | GATED_FFN)
