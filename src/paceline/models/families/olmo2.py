"""OLMo 2 (Walsh et al., arXiv:2501.00656): norms after attention and feed-forward, and on queries
and keys as a whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from paceline.models.families import llama
from paceline.models.families.base import (
    ATTENTION,
    GATED_FFN,
    QUERY_KEY_NORMS,
    Stored,
    read_common,
    write_common,
)
from paceline.models.families.base import weight_map as common_map
from paceline.plan.model_spec import ModelSpec

PRESETS = llama.little(family="olmo2", norm_placement="after", qk_norm="all") | {
    "1b": ModelSpec(
        family="olmo2",
        vocab_size=100352,
        d_model=2048,
        num_layers=16,
        num_heads=16,
        num_kv_heads=16,
        head_dim=128,
        d_ffn=8192,
        max_positions=4096,
        rope_theta=500000.0,
        norm_eps=1e-6,
        norm_placement="after",
        qk_norm="all",
    )
}

_POST_NORMS = {
    "attention_post_norm": "post_attention_layernorm",
    "ffn_post_norm": "post_feedforward_layernorm",
}


def spec_from_config(config: Mapping[str, Any]) -> ModelSpec:
    bias = config.get("attention_bias", False)
    return ModelSpec(
        family="olmo2",
        norm_placement="after",
        qk_norm="all",
        qkv_bias=bias,
        output_bias=bias,
        **read_common(config),
    )


def config_from_spec(spec: ModelSpec) -> dict[str, Any]:
    common = write_common(spec, "olmo2", "Olmo2ForCausalLM")
    return common | {"attention_bias": spec.qkv_bias}


def weight_map(spec: ModelSpec) -> dict[str, Stored]:
    return common_map(spec, ATTENTION | QUERY_KEY_NORMS | _POST_NORMS | GATED_FFN)
