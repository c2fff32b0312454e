"""Qwen 2 and 2.5 (Yang et al., arXiv:2407.10671): Llama with biases on queries, keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from paceline.models.families import llama
from paceline.models.families.base import read_common, read_windows, write_common, write_windows
from paceline.plan.model_spec import ModelSpec

PRESETS = {"tiny": replace(llama.PRESETS["tiny"], family="qwen2", qkv_bias=True)}

weight_map = llama.weight_map


def spec_from_config(config: Mapping[str, Any]) -> ModelSpec:
    windows = read_windows({"use_sliding_window": False, **config})
    return ModelSpec(family="qwen2", qkv_bias=True, **windows, **read_common(config))


def config_from_spec(spec: ModelSpec) -> dict[str, Any]:
    return write_common(spec, "qwen2", "Qwen2ForCausalLM") | write_windows(spec)
