"""Llama (Touvron et al., arXiv:2302.13971) and what shares its architecture, SmolLM2 among them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from paceline.models.families.base import (
    ATTENTION,
    GATED_FFN,
    PRE_NORMS,
    Stored,
    read_common,
    write_common,
)
from paceline.models.families.base import weight_map as common_map
from paceline.plan.model_spec import ModelSpec, RopeScaling

PRESETS = {
    "tiny": ModelSpec(
        family="llama",
        vocab_size=259,
        d_model=48,
        num_layers=3,
        num_heads=6,
        num_kv_heads=3,
        head_dim=8,
        d_ffn=136,
        max_positions=512,
        tied_embeddings=True,
    ),
    "small": ModelSpec(
        family="llama",
        vocab_size=259,
        d_model=256,
        num_layers=8,
        num_heads=8,
        num_kv_heads=4,
        head_dim=32,
        d_ffn=704,
        max_positions=2048,
        tied_embeddings=True,
    ),
    "135m": ModelSpec(  # SmolLM2
        family="llama",
        vocab_size=49152,
        d_model=576,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        d_ffn=1536,
        max_positions=8192,
        rope_theta=100000.0,
        tied_embeddings=True,
    ),
    "1b": ModelSpec(  # Llama 3.2
        family="llama",
        vocab_size=128256,
        d_model=2048,
        num_layers=16,
        num_heads=32,
        num_kv_heads=8,
        head_dim=64,
        d_ffn=8192,
        max_positions=131072,
        rope_theta=500000.0,
        rope_scaling=RopeScaling(kind="llama3", factor=32.0),
        tied_embeddings=True,
    ),
    "8b": ModelSpec(  # Llama 3.1
        family="llama",
        vocab_size=128256,
        d_model=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        d_ffn=14336,
        max_positions=131072,
        rope_theta=500000.0,
        rope_scaling=RopeScaling(kind="llama3", factor=8.0),
    ),
}


def little(**changes: Any) -> dict[str, ModelSpec]:
    """The sizes `tiny` and `small` of a family that differs from Llama by some fields."""
    return {size: replace(PRESETS[size], **changes) for size in ("tiny", "small")}


def spec_from_config(config: Mapping[str, Any]) -> ModelSpec:
    bias = config.get("attention_bias", False)
    ffn_bias = config.get("mlp_bias", False)
    fields = read_common(config)
    return ModelSpec(family="llama", qkv_bias=bias, output_bias=bias, ffn_bias=ffn_bias, **fields)


def config_from_spec(spec: ModelSpec) -> dict[str, Any]:
    common = write_common(spec, "llama", "LlamaForCausalLM")
    return common | {"attention_bias": spec.qkv_bias, "mlp_bias": spec.ffn_bias}


def weight_map(spec: ModelSpec) -> dict[str, Stored]:
    return common_map(spec, PRE_NORMS | ATTENTION | GATED_FFN)
