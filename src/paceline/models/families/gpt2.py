"""GPT-2 (Radford et al., Language Models are Unsupervised Multitask Learners, 2019): learned
positions, layer norms, biases everywhere, and queries, keys and values in one matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from paceline.models.families.base import Stored, read_activation, refuse
from paceline.plan.model_spec import ModelSpec

_NEUTRAL = {
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
}
_ACTIVATIONS = {"gelu_new": "gelu-tanh", "gelu_pytorch_tanh": "gelu-tanh"}


def _preset(
    *,
    vocab_size: int,
    d_model: int,
    num_layers: int,
    num_heads: int,
    d_ffn: int,
    max_positions: int,
) -> ModelSpec:
    return ModelSpec(
        family="gpt2",
        vocab_size=vocab_size,
        d_model=d_model,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=d_model // num_heads,
        d_ffn=d_ffn,
        max_positions=max_positions,
        positions="learned",
        norm="layer",
        activation="gelu-tanh",
        gated_ffn=False,
        tied_embeddings=True,
        qkv_bias=True,
        output_bias=True,
        ffn_bias=True,
    )


PRESETS = {
    "tiny": _preset(
        vocab_size=259, d_model=48, num_layers=3, num_heads=6, d_ffn=136, max_positions=512
    ),
    "small": _preset(
        vocab_size=259, d_model=256, num_layers=8, num_heads=8, d_ffn=1024, max_positions=2048
    ),
    "124m": _preset(
        vocab_size=50257, d_model=768, num_layers=12, num_heads=12, d_ffn=3072, max_positions=1024
    ),
}


def spec_from_config(config: Mapping[str, Any]) -> ModelSpec:
    refuse(config, _NEUTRAL)
    d_model, num_heads = config["n_embd"], config["n_head"]
    return ModelSpec(
        family="gpt2",
        vocab_size=config["vocab_size"],
        d_model=d_model,
        num_layers=config["n_layer"],
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=d_model // num_heads,
        d_ffn=config.get("n_inner") or 4 * d_model,
        max_positions=config["n_positions"],
        positions="learned",
        norm="layer",
        norm_eps=config.get("layer_norm_epsilon", 1e-5),
        activation=read_activation(config, "activation_function", _ACTIVATIONS),  # type: ignore[arg-type]
        gated_ffn=False,
        tied_embeddings=config.get("tie_word_embeddings", True),
        qkv_bias=True,
        output_bias=True,
        ffn_bias=True,
        initializer_std=config.get("initializer_range", 0.02),
    )


def config_from_spec(spec: ModelSpec) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": spec.vocab_size,
        "n_embd": spec.d_model,
        "n_layer": spec.num_layers,
        "n_head": spec.num_heads,
        "n_inner": spec.d_ffn,
        "n_positions": spec.max_positions,
        "layer_norm_epsilon": spec.norm_eps,
        "activation_function": "gelu_new",
        "tie_word_embeddings": spec.tied_embeddings,
        "initializer_range": spec.initializer_std,
    }


def weight_map(spec: ModelSpec) -> dict[str, Stored]:
    names = {
        "embedding.weight": "transformer.wte.weight",
        "position_embedding.weight": "transformer.wpe.weight",
        "norm.weight": "transformer.ln_f.weight",
        "norm.bias": "transformer.ln_f.bias",
    }
    if not spec.tied_embeddings:
        names["head.weight"] = "lm_head.weight"
    stored = {ours: Stored((name,)) for ours, name in names.items()}
    for layer in range(spec.num_layers):
        stored |= _block(spec, f"blocks.{layer}", f"transformer.h.{layer}")
    return stored


def _block(spec: ModelSpec, ours: str, published: str) -> dict[str, Stored]:
    """One block; matrices are stored with inputs as rows."""
    stored: dict[str, Stored] = {}
    for kind in ("weight", "bias"):
        is_matrix = kind == "weight"
        stored[f"{ours}.attention_norm.{kind}"] = Stored((f"{published}.ln_1.{kind}",))
        stored[f"{ours}.ffn_norm.{kind}"] = Stored((f"{published}.ln_2.{kind}",))
        for number, part in enumerate(("query", "key", "value")):
            rows = (number * spec.d_model, (number + 1) * spec.d_model)
            name = f"{published}.attn.c_attn.{kind}"
            stored[f"{ours}.attention.{part}.{kind}"] = Stored((name,), is_matrix, rows)
        for part, name in (
            ("attention.output", "attn.c_proj"),
            ("ffn.up", "mlp.c_fc"),
            ("ffn.down", "mlp.c_proj"),
        ):
            stored[f"{ours}.{part}.{kind}"] = Stored((f"{published}.{name}.{kind}",), is_matrix)
    return stored
