"""Qwen 3 (Yang et al., arXiv:2505.09388): Llama with a norm on each query and key head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
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

PRESETS = {"tiny": replace(llama.PRESETS["tiny"], family="qwen3", qk_norm="head")}


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
