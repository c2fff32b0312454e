"""Llama (Touvron et al., arXiv:2302.13971) and what shares its architecture, SmolLM2 among them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from paceline.core.errors import UsageError
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
    "1b": ModelSpec(
        family="llama",
        vocab_size=32000,
        d_model=2048,
        num_layers=22,
        num_heads=32,
        num_kv_heads=8,
        head_dim=64,
        d_ffn=5632,
        max_positions=4096,
    ),
}

_BLOCK_NAMES = {
    "attention_norm": "input_layernorm",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn.gate": "mlp.gate_proj",
    "ffn.up": "mlp.up_proj",
    "ffn.down": "mlp.down_proj",
}


def spec_from_config(config: Mapping[str, Any]) -> ModelSpec:
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise UsageError(f"hidden_act {activation!r} is not built in this version", hint="silu")
    num_heads = config["num_attention_heads"]
    rope = config.get("rope_parameters") or {}  # transformers 5 keeps theta and scaling here
    return ModelSpec(
        family="llama",
        vocab_size=config["vocab_size"],
        d_model=config["hidden_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=num_heads,
        num_kv_heads=config.get("num_key_value_heads") or num_heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // num_heads,
        d_ffn=config["intermediate_size"],
        max_positions=config.get("max_position_embeddings", 2048),
        rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
        rope_scaling=_rope_scaling(rope or config.get("rope_scaling") or {}),
        norm_eps=config.get("rms_norm_eps", 1e-6),
        tied_embeddings=config.get("tie_word_embeddings", False),
        attention_bias=config.get("attention_bias", False),
        ffn_bias=config.get("mlp_bias", False),
        initializer_std=config.get("initializer_range", 0.02),
    )


def config_from_spec(spec: ModelSpec) -> dict[str, Any]:
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.d_model,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "intermediate_size": spec.d_ffn,
        "hidden_act": "silu",
        "max_position_embeddings": spec.max_positions,
        "rope_theta": spec.rope_theta,
        "rms_norm_eps": spec.norm_eps,
        "tie_word_embeddings": spec.tied_embeddings,
        "attention_bias": spec.attention_bias,
        "mlp_bias": spec.ffn_bias,
        "initializer_range": spec.initializer_std,
    }
    if spec.rope_scaling is not None:
        config["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": spec.rope_scaling.factor,
            "low_freq_factor": spec.rope_scaling.low_factor,
            "high_freq_factor": spec.rope_scaling.high_factor,
            "original_max_position_embeddings": spec.rope_scaling.original_positions,
        }
    return config


def weight_names(spec: ModelSpec) -> dict[str, str]:
    names = {"embedding.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight"}
    if not spec.tied_embeddings:
        names["head.weight"] = "lm_head.weight"
    for layer in range(spec.num_layers):
        for ours, published in _BLOCK_NAMES.items():
            for kind in ("weight", "bias") if _has_bias(spec, ours) else ("weight",):
                names[f"blocks.{layer}.{ours}.{kind}"] = f"model.layers.{layer}.{published}.{kind}"
    return names


def _has_bias(spec: ModelSpec, part: str) -> bool:
    return {"attention": spec.attention_bias, "ffn": spec.ffn_bias}.get(part.split(".")[0], False)


def _rope_scaling(config: Mapping[str, Any]) -> RopeScaling | None:
    kind = config.get("rope_type") or config.get("type") or "default"
    if kind == "default":
        return None
    if kind != "llama3":
        raise UsageError(f"rope_type {kind!r} is not built in this version", hint="default, llama3")
    return RopeScaling(
        factor=float(config["factor"]),
        low_factor=float(config["low_freq_factor"]),
        high_factor=float(config["high_freq_factor"]),
        original_positions=config["original_max_position_embeddings"],
    )
