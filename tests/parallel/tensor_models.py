"""Tiny causal models of `transformers`: two layers, and sizes that two ranks do not divide."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers
from torch import nn

Config = Callable[[], transformers.PretrainedConfig]

_WORDS = {"vocab_size": 61, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
_USUAL = {
    **_WORDS,
    "hidden_size": 32,
    "intermediate_size": 27,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
_GROUPED = {**_USUAL, "num_key_value_heads": 2}
_OLD = {**_WORDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "n_inner": 27}


def _config(name: str, base: dict[str, object], **changes: object) -> Config:
    return lambda: getattr(transformers, f"{name}Config")(**{**base, **changes})


OURS: dict[str, Config] = {
    "llama": _config("Llama", _GROUPED),
    "mistral": _config("Mistral", _GROUPED),
    "qwen2": _config("Qwen2", _GROUPED),
    "qwen3": _config("Qwen3", _GROUPED, head_dim=8),
    "gemma3": _config("Gemma3Text", _GROUPED, head_dim=8),
    "olmo2": _config("Olmo2", _GROUPED),
    "mixtral": _config("Mixtral", _GROUPED, num_local_experts=3),
    "qwen3-moe": _config(
        "Qwen3Moe",
        _GROUPED,
        head_dim=8,
        num_experts=3,
        num_experts_per_tok=2,
        moe_intermediate_size=12,
        mlp_only_layers=[0],
    ),
    "gpt2": _config("GPT2", _OLD),
}
"""Those of which we have hand-written rules."""

OTHERS: dict[str, Config] = {
    "gemma3, one key head": _config("Gemma3Text", _USUAL, head_dim=8, num_key_value_heads=1),
    "opt": _config("OPT", _USUAL, ffn_dim=27, word_embed_proj_dim=32, pad_token_id=1),
    "gpt-neox": _config("GPTNeoX", _USUAL),
    "gptj": _config("GPTJ", _OLD, rotary_dim=4),
    "gpt-neo": _config(
        "GPTNeo",
        _WORDS,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        intermediate_size=27,
        max_position_embeddings=32,
        attention_types=[[["global", "local"], 1]],
    ),
    "phi": _config("Phi", _GROUPED),
    "phi3": _config("Phi3", _GROUPED),
    "stablelm": _config("StableLm", _GROUPED),
    "starcoder2": _config("Starcoder2", _GROUPED),
    "gpt-bigcode": _config("GPTBigCode", _OLD),
    "cohere": _config("Cohere", _GROUPED),
    "gemma2": _config("Gemma2", _GROUPED, head_dim=8),
    "granite": _config("Granite", _GROUPED),
    "falcon": _config(
        "Falcon", _USUAL, num_kv_heads=2, new_decoder_architecture=True, ffn_hidden_size=27
    ),
    "falcon, one key head": _config("Falcon", _USUAL, multi_query=True, ffn_hidden_size=27),
    "olmo": _config("Olmo", _GROUPED),
    "smollm3": _config("SmolLM3", _GROUPED),
    "nemotron": _config("Nemotron", _GROUPED),
    "persimmon": _config("Persimmon", _USUAL),
    "glm4": _config("Glm4", _GROUPED, head_dim=8),
    "apertus": _config("Apertus", _GROUPED),
    "exaone4": _config("Exaone4", _GROUPED),
    "qwen2-moe": _config(
        "Qwen2Moe",
        _GROUPED,
        num_experts=3,
        num_experts_per_tok=2,
        moe_intermediate_size=12,
        shared_expert_intermediate_size=15,
    ),
    "deepseek-v3": _config(
        "DeepseekV3",
        _USUAL,
        num_key_value_heads=4,
        q_lora_rank=12,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=12,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
    ),
    "gpt-oss": _config("GptOss", _GROUPED, head_dim=8, num_local_experts=3, num_experts_per_tok=2),
}
"""Those of which we know nothing."""

REFUSED: dict[str, Config] = {
    "bloom": _config("Bloom", _WORDS, hidden_size=32, n_layer=2, n_head=4),
}
"""Those whose attention reads more than shapes can tell."""

BY_VERSION: dict[str, Config] = {"codegen": _config("CodeGen", _OLD, rotary_dim=4)}
"""Refused or split as their code is written: CodeGen in transformers 5.23 and 5.24."""


def build(config: Config) -> nn.Module:
    """A model in evaluation whose every parameter is random: none is zero, or one, by nature."""
    torch.manual_seed(1)
    module = transformers.AutoModelForCausalLM.from_config(config()).eval()
    choose_experts = getattr(module, "set_experts_implementation", None)
    if choose_experts is not None:  # the grouped products know no odd sizes
        choose_experts("eager")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    if config is OTHERS["opt"]:
        # Queries that are not rotated see no bias of keys: its gradient is rounding and no more.
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(not name.endswith("k_proj.bias"))
    return module
