"""Families: how a published config becomes a `ModelSpec`, and which weight is which.

A family is a module with

    spec_from_config(config: dict) -> ModelSpec      reads a Hugging Face config.json
    config_from_spec(spec: ModelSpec) -> dict        writes one
    weight_map(spec: ModelSpec) -> dict[str, Stored] our parameters to where files keep them
    PRESETS: dict[str, ModelSpec]                    sizes for ``random:FAMILY:SIZE``

none of which needs torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from paceline.core.errors import ConfigError, Problem, UsageError, name_hint
from paceline.core.registry import NameTable
from paceline.models.ladder_config import is_ladder, plain_part
from paceline.plan.model_spec import ModelSpec, MoeSpec

_SIZES = (
    "vocab_size",
    "d_model",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "d_ffn",
    "max_positions",
)

FAMILIES = NameTable(
    "model family",
    {
        "llama": "paceline.models.families.llama",
        "mistral": "paceline.models.families.mistral",
        "qwen2": "paceline.models.families.qwen2",
        "qwen3": "paceline.models.families.qwen3",
        "gemma3": "paceline.models.families.gemma3",
        "gpt2": "paceline.models.families.gpt2",
        "olmo2": "paceline.models.families.olmo2",
        "mixtral": "paceline.models.families.mixtral",
        "qwen2-moe": "paceline.models.families.qwen2_moe",
        "qwen3-moe": "paceline.models.families.qwen3_moe",
        "pangu-moe": "paceline.models.families.pangu_moe",
    },
)

_MODEL_TYPES = {
    "llama": "llama",
    "mistral": "mistral",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma3_text": "gemma3",
    "gpt2": "gpt2",
    "olmo2": "olmo2",
    "mixtral": "mixtral",
    "qwen2_moe": "qwen2-moe",
    "qwen3_moe": "qwen3-moe",
    "PanguProMoE": "pangu-moe",
    "PanGuMoE": "pangu-moe",
}
"""What a config.json calls each family."""


def family(name: str) -> Any:
    """The module of a family.

    Raises:
        UnknownNameError: no such family.
    """
    return importlib.import_module(FAMILIES[name])


def spec_from_config(config: Mapping[str, Any], *, source: str) -> ModelSpec:
    """The sizes that a Hugging Face config.json states.

    Raises:
        UsageError: a family or a feature that this version does not compute; names it.
        ConfigError: sizes that make no model, all of them.
    """
    if is_ladder(config):
        return _ladder_spec(config, source)
    model_type = str(config.get("model_type"))
    if model_type not in _MODEL_TYPES:
        hint = name_hint(model_type, _MODEL_TYPES)
        raise UsageError(
            f"{source}: model_type {model_type!r} is not built in this version", hint=hint
        )
    name = _MODEL_TYPES[model_type]
    try:
        spec: ModelSpec = family(name).spec_from_config(config)
    except KeyError as error:
        raise UsageError(f"{source}: lacks the key {error}") from error
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise UsageError(f"{source}: a value is not what its key needs: {error}") from error
    except UsageError as error:
        raise UsageError(f"{source}: {error.message}", hint=error.hint) from error
    spec = ModelSpec.from_dict(spec.to_dict(), source=source)  # a file's values may be of any type
    if problems := _problems(spec):
        raise ConfigError(problems, source=source)
    return spec


def _ladder_spec(config: Mapping[str, Any], source: str) -> ModelSpec:
    try:
        plain, first_layer = plain_part(config)
    except KeyError as error:
        raise UsageError(f"{source}: lacks the key {error}") from error
    except TypeError as error:
        raise UsageError(f"{source}: a value is not what its key needs: {error}") from error
    spec = replace(spec_from_config(plain, source=source), ladder_from=first_layer)
    spec = ModelSpec.from_dict(spec.to_dict(), source=source)
    if problems := _ladder_problems(spec):
        raise ConfigError(problems, source=source)
    return spec


def _ladder_problems(spec: ModelSpec) -> list[Problem]:
    first, problems = spec.ladder_from, list[Problem]()
    if first is None or not 0 <= first < spec.num_layers:
        rule = f"must be a layer, from 0 to {spec.num_layers - 1}"
        problems.append(Problem("ladder_from", str(first), rule))
    if spec.norm_placement != "before":
        rule = "must be before: a norm behind a sublayer needs its output at once"
        problems.append(Problem("norm_placement", spec.norm_placement, rule))
    return problems


def _problems(spec: ModelSpec) -> list[Problem]:
    """Sizes that make no model."""
    sizes = {name: getattr(spec, name) for name in _SIZES}
    problems = [Problem(n, str(v), "must be positive") for n, v in sizes.items() if v <= 0]
    if not problems and spec.num_heads % spec.num_kv_heads:
        rule = f"must divide num_heads = {spec.num_heads}"
        problems.append(Problem("num_kv_heads", str(spec.num_kv_heads), rule))
    if spec.head_dim % 2 and spec.positions == "rotary":
        rule = "must be even: rotary positions turn its halves against each other"
        problems.append(Problem("head_dim", str(spec.head_dim), rule))
    return problems if spec.moe is None else problems + _expert_problems(spec.moe)


def _expert_problems(moe: MoeSpec) -> list[Problem]:
    """Sizes that make no mixture of experts."""
    problems: list[Problem] = []
    if not 0 < moe.experts_per_token <= moe.num_experts:
        rule = f"must be from 1 to num_experts = {moe.num_experts}"
        problems.append(Problem("moe.experts_per_token", str(moe.experts_per_token), rule))
    sizes = (moe.num_experts, moe.experts_per_token)
    if moe.num_groups <= 0 or any(size % moe.num_groups for size in sizes):
        rule = f"must divide num_experts = {sizes[0]} and experts_per_token = {sizes[1]}"
        problems.append(Problem("moe.num_groups", str(moe.num_groups), rule))
    if moe.d_shared < 0:
        problems.append(Problem("moe.d_shared", str(moe.d_shared), "must not be negative"))
    if moe.shared_gate and moe.d_shared <= 0:
        rule = "is for what all tokens share, which has the width moe.d_shared = 0"
        problems.append(Problem("moe.shared_gate", "true", rule))
    return problems
