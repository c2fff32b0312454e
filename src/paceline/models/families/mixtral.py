"""Mixtral (Jiang et al., arXiv:2401.04088): Mistral with experts in every layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from paceline.models.families import llama
from paceline.models.families.base import (
    ATTENTION,
    PRE_NORMS,
    Stored,
    read_common,
    write_common,
)
from paceline.models.families.base import weight_map as common_map
from paceline.plan.model_spec import ModelSpec, MoeSpec

_EXPERTS = {
    part: f"block_sparse_moe.experts.{{}}.{name}"
    for part, name in {"gate": "w1", "up": "w3", "down": "w2"}.items()
}
_THETA = 1e6

_CHANGES: dict[str, Any] = {"family": "mixtral", "tied_embeddings": False, "rope_theta": _THETA}

PRESETS = {
    "tiny": replace(
        llama.PRESETS["tiny"],
        moe=MoeSpec(num_experts=8, experts_per_token=2, d_expert=72),
        **_CHANGES,
    ),
    "small": replace(
        llama.PRESETS["small"],
        moe=MoeSpec(num_experts=8, experts_per_token=2, d_expert=176),
        **_CHANGES,
    ),
    "8x7b": ModelSpec(
        family="mixtral",
        vocab_size=32000,
        d_model=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        d_ffn=14336,
        max_positions=32768,
        rope_theta=_THETA,
        moe=MoeSpec(num_experts=8, experts_per_token=2, d_expert=14336),
    ),
}


def spec_from_config(config: Mapping[str, Any]) -> ModelSpec:
    moe = MoeSpec(
        num_experts=config["num_local_experts"],
        experts_per_token=config["num_experts_per_tok"],
        d_expert=config["intermediate_size"],
    )
    fields = read_common({"rms_norm_eps": 1e-5, **config}, theta=_THETA)
    return ModelSpec(family="mixtral", moe=moe, window=config.get("sliding_window"), **fields)


def config_from_spec(spec: ModelSpec) -> dict[str, Any]:
    assert spec.moe is not None
    return write_common(spec, "mixtral", "MixtralForCausalLM") | {
        "intermediate_size": spec.moe.d_expert,
        "num_local_experts": spec.moe.num_experts,
        "num_experts_per_tok": spec.moe.experts_per_token,
        "sliding_window": spec.window,
    }


def weight_map(spec: ModelSpec) -> dict[str, Stored]:
    return common_map(spec, PRE_NORMS | ATTENTION, experts=_EXPERTS, router="block_sparse_moe.gate")
