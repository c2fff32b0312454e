"""What families share: the usual keys of a config.json, and the usual names of weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from paceline.core.errors import UsageError
from paceline.plan.model_spec import ModelSpec, RopeScaling

SILU = {"silu": "silu"}


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a parameter of ours lies in published files.

    Attributes:
        names: of one tensor, or of several that are stacked, one for each expert.
        is_transposed: whether the file has inputs as rows.
        rows: first and last + 1 row, where the file's tensor holds more than this parameter.
        is_row: whether the file has a vector as the one row of a matrix.
    """

    names: tuple[str, ...]
    is_transposed: bool = False
    rows: tuple[int, int] | None = None
    is_row: bool = False


def read_common(config: Mapping[str, Any], *, theta: float = 10000.0) -> dict[str, Any]:
    """Fields of a `ModelSpec` that most families state under the same keys.

    Args:
        config: a config.json.
        theta: the family's base of rotary frequencies where the file states none.
    """
    num_heads = config["num_attention_heads"]
    rope = rope_parameters(config)
    return {
        "vocab_size": config["vocab_size"],
        "d_model": config["hidden_size"],
        "num_layers": config["num_hidden_layers"],
        "num_heads": num_heads,
        "num_kv_heads": config.get("num_key_value_heads") or num_heads,
        "head_dim": config.get("head_dim") or config["hidden_size"] // num_heads,
        "d_ffn": config["intermediate_size"],
        "max_positions": config.get("max_position_embeddings", 2048),
        "rope_theta": float(rope.get("rope_theta") or config.get("rope_theta") or theta),
        "rope_scaling": read_scaling(rope),
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "activation": read_activation(config, "hidden_act", SILU),
        "tied_embeddings": config.get("tie_word_embeddings", False),
        "initializer_std": config.get("initializer_range", 0.02),
    }


def write_common(spec: ModelSpec, model_type: str, architecture: str) -> dict[str, Any]:
    """What `read_common` reads, and the names that `transformers` goes by."""
    config: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": model_type,
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
        "initializer_range": spec.initializer_std,
    }
    if spec.rope_scaling is not None:
        config["rope_scaling"] = write_scaling(spec.rope_scaling)
    return config


def rope_parameters(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Rotary parameters, which transformers 5 keeps under another key than its forebears."""
    return config.get("rope_parameters") or config.get("rope_scaling") or {}


def read_scaling(rope: Mapping[str, Any]) -> RopeScaling | None:
    """How frequencies are stretched.

    Raises:
        UsageError: a way that is not built.
    """
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling(kind="linear", factor=float(rope["factor"]))
    if kind != "llama3":
        hint = "default, linear, llama3"
        raise UsageError(f"rope_type {kind!r} is not built in this version", hint=hint)
    return RopeScaling(
        kind="llama3",
        factor=float(rope["factor"]),
        low_factor=float(rope["low_freq_factor"]),
        high_factor=float(rope["high_freq_factor"]),
        original_positions=rope["original_max_position_embeddings"],
    )


def write_scaling(scaling: RopeScaling) -> dict[str, Any]:
    """What `read_scaling` reads."""
    if scaling.kind == "linear":
        return {"rope_type": "linear", "factor": scaling.factor}
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_factor,
        "high_freq_factor": scaling.high_factor,
        "original_max_position_embeddings": scaling.original_positions,
    }


def read_activation(config: Mapping[str, Any], key: str, built: Mapping[str, str]) -> str:
    """Our name of the activation.

    Raises:
        UsageError: one that the family does not have here.
    """
    name = config.get(key, next(iter(built)))
    if name not in built:
        hint = ", ".join(built)
        raise UsageError(f"{key} {name!r} is not built in this version", hint=hint)
    return built[name]


def refuse(config: Mapping[str, Any], neutral: Mapping[str, Sequence[Any]]) -> None:
    """Raises UsageError where a key has a value that would change what is computed."""
    for key, values in neutral.items():
        if key in config and config[key] not in values:
            raise UsageError(f"{key} = {config[key]!r} is not built in this version")


def read_windows(config: Mapping[str, Any]) -> dict[str, Any]:
    """The window and the layers without one, from Qwen's and Gemma's keys."""
    window = config.get("sliding_window")
    if not config.get("use_sliding_window", True) or window is None:
        return {}
    kinds = config.get("layer_types")
    if kinds is None:  # Qwen's older files: the first layers see everything
        num_global = config.get("max_window_layers", config["num_hidden_layers"])
        return {"window": window, "global_layers": tuple(range(num_global))}
    is_global = [kind == "full_attention" for kind in kinds]
    return {
        "window": window,
        "global_layers": tuple(n for n, is_it in enumerate(is_global) if is_it),
    }


def write_windows(spec: ModelSpec) -> dict[str, Any]:
    """What `read_windows` reads."""
    kinds = ["full_attention", "sliding_attention"]
    layers = range(spec.num_layers)
    return {
        "use_sliding_window": spec.window is not None,
        "sliding_window": spec.window,
        "layer_types": [kinds[spec.window_of(layer) is not None] for layer in layers],
    }


ATTENTION = {
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj",
}
QUERY_KEY_NORMS = {
    "attention.query_norm": "self_attn.q_norm",
    "attention.key_norm": "self_attn.k_norm",
}
PRE_NORMS = {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
GATED_FFN = {"ffn.gate": "mlp.gate_proj", "ffn.up": "mlp.up_proj", "ffn.down": "mlp.down_proj"}
EXPERTS = {part: f"mlp.experts.{{}}.{part}_proj" for part in ("gate", "up", "down")}
SHARED_FFN = {f"ffn.shared.{part}": f"mlp.shared_expert.{part}_proj" for part in EXPERTS}


def weight_map(
    spec: ModelSpec,
    block: dict[str, str],
    *,
    experts: Mapping[str, str] | None = None,
    router: str = "",
    beside: dict[str, str] | None = None,
) -> dict[str, Stored]:
    """Our parameters to the names that Llama and its kin store them under.

    Args:
        spec: decides the layers, and which parts have biases.
        block: part of a block to its name.
        experts: part of the experts to its name, with ``{}`` for the expert's number; their layers
            have no plain feed-forward.
        router: name of the experts' router.
        beside: part of a block to its name, in layers with experts alone.
    """
    names = {"embedding.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight"}
    if not spec.tied_embeddings:
        names["head.weight"] = "lm_head.weight"
    stored = {ours: Stored((name,)) for ours, name in names.items()}
    for layer in range(spec.num_layers):
        ours, published = f"blocks.{layer}", f"model.layers.{layer}"
        parts = block | (beside or {}) if spec.has_experts(layer) else block
        for part, name in parts.items():
            if spec.has_experts(layer) and part in GATED_FFN:
                continue
            for kind in ("weight", "bias") if _has_bias(spec, part) else ("weight",):
                stored[f"{ours}.{part}.{kind}"] = Stored((f"{published}.{name}.{kind}",))
        if spec.has_experts(layer):
            assert spec.moe is not None
            assert experts is not None
            stored[f"{ours}.ffn.router.weight"] = Stored((f"{published}.{router}.weight",))
            for part, name in experts.items():
                all_names = [name.format(number) for number in range(spec.moe.num_experts)]
                stored[f"{ours}.ffn.experts.{part}"] = Stored(
                    tuple(f"{published}.{one}.weight" for one in all_names)
                )
    return stored


def _has_bias(spec: ModelSpec, part: str) -> bool:
    if part in ("attention.query", "attention.key", "attention.value"):
        return spec.qkv_bias
    return spec.output_bias if part == "attention.output" else part in GATED_FFN and spec.ffn_bias
