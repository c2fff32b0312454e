"""Gemma 3, text only (Gemma Team, arXiv:2503.19786): windowed layers with a global one between,
norms before and after, weights of norms kept as differences from 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from paceline.models.families import llama
from paceline.models.families.base import (
    ATTENTION,
    GATED_FFN,
    QUERY_KEY_NORMS,
    Stored,
    read_activation,
    read_common,
    read_scaling,
    read_windows,
    refuse,
    write_common,
    write_scaling,
    write_windows,
)
from paceline.models.families.base import weight_map as common_map
from paceline.plan.model_spec import ModelSpec

_NORMS = {
    "attention_norm": "input_layernorm",
    "attention_post_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_post_norm": "post_feedforward_layernorm",
}
_NEUTRAL = {
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "use_bidirectional_attention": (False, None),
}
_THETA, _WINDOW_THETA, _GLOBAL_EVERY = 1e6, 1e4, 6

_CHANGES: dict[str, Any] = {
    "family": "gemma3",
    "rope_theta": _THETA,
    "window_rope_theta": _WINDOW_THETA,
    "norm_offset": 1.0,
    "norm_placement": "both",
    "qk_norm": "head",
    "activation": "gelu-tanh",
}

PRESETS = {
    "tiny": replace(
        llama.PRESETS["tiny"],
        window=24,
        global_layers=(1,),
        embedding_scale=math.sqrt(llama.PRESETS["tiny"].d_model),
        **_CHANGES,
    ),
    "small": replace(
        llama.PRESETS["small"],
        window=128,
        global_layers=(5,),
        embedding_scale=math.sqrt(llama.PRESETS["small"].d_model),
        **_CHANGES,
    ),
    "270m": ModelSpec(
        vocab_size=262144,
        d_model=640,
        num_layers=18,
        num_heads=4,
        num_kv_heads=1,
        head_dim=256,
        d_ffn=2048,
        max_positions=32768,
        window=512,
        global_layers=(5, 11, 17),
        norm_eps=1e-6,
        tied_embeddings=True,
        embedding_scale=math.sqrt(640),
        attention_scale=256**-0.5,
        **_CHANGES,
    ),
}


def spec_from_config(config: Mapping[str, Any]) -> ModelSpec:
    refuse(config, _NEUTRAL)
    both = config.get("rope_parameters") or {}
    rope = both.get("full_attention") or config.get("rope_scaling") or {}
    window_rope = both.get("sliding_attention") or {}
    activation = {"gelu_pytorch_tanh": "gelu-tanh"}
    bias = config.get("attention_bias", False)
    fields = read_common(
        {**config, "rope_parameters": None, "rope_scaling": None, "hidden_act": "silu"}
    )
    fields |= {
        "tied_embeddings": config.get("tie_word_embeddings", True),
        "rope_theta": float(rope.get("rope_theta") or config.get("rope_theta") or _THETA),
        "rope_scaling": read_scaling(rope),
        "activation": read_activation(config, "hidden_activation", activation),
    }
    return ModelSpec(
        family="gemma3",
        window_rope_theta=float(
            window_rope.get("rope_theta") or config.get("rope_local_base_freq") or _WINDOW_THETA
        ),
        norm_offset=1.0,
        norm_placement="both",
        qk_norm="head",
        embedding_scale=math.sqrt(config["hidden_size"]),
        attention_scale=config.get("query_pre_attn_scalar", 256) ** -0.5,
        qkv_bias=bias,
        output_bias=bias,
        **read_windows({"layer_types": _layer_types(config), **config}),
        **fields,
    )


def config_from_spec(spec: ModelSpec) -> dict[str, Any]:
    config = write_common(spec, "gemma3_text", "Gemma3ForCausalLM")
    scale = spec.head_dim**-0.5 if spec.attention_scale is None else spec.attention_scale
    del config["hidden_act"]
    if spec.rope_scaling is not None:
        config["rope_scaling"] = write_scaling(spec.rope_scaling)
    return config | {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": round(scale**-2),
        "rope_local_base_freq": spec.window_rope_theta,
        "attention_bias": spec.qkv_bias,
        **write_windows(spec),
    }


def weight_map(spec: ModelSpec) -> dict[str, Stored]:
    return common_map(spec, _NORMS | ATTENTION | QUERY_KEY_NORMS | GATED_FFN)


def _layer_types(config: Mapping[str, Any]) -> list[str]:
    """Which layers have a window, in files that state only how often one has not."""
    every = config.get("sliding_window_pattern", _GLOBAL_EVERY)
    layers = range(1, config["num_hidden_layers"] + 1)
    return ["sliding_attention" if layer % every else "full_attention" for layer in layers]
