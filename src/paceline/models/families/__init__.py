"""Families: how a published config becomes a `ModelSpec`, and which weight is which.

A family is a module with

    spec_from_config(config: dict) -> ModelSpec     reads a Hugging Face config.json
    config_from_spec(spec: ModelSpec) -> dict       writes one
    weight_names(spec: ModelSpec) -> dict           our parameter name to the published one
    PRESETS: dict[str, ModelSpec]                   sizes for ``random:FAMILY:SIZE``

none of which needs torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from paceline.core.errors import UsageError, name_hint
from paceline.core.registry import NameTable
from paceline.plan.model_spec import ModelSpec

FAMILIES = NameTable("model family", {"llama": "paceline.models.families.llama"})


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
    """
    name = str(config.get("model_type"))
    if name not in FAMILIES:
        hint = name_hint(name, FAMILIES)
        raise UsageError(f"{source}: model_type {name!r} is not built in this version", hint=hint)
    try:
        return family(name).spec_from_config(config)
    except KeyError as error:
        raise UsageError(f"{source}: lacks the key {error}") from error
    except UsageError as error:
        raise UsageError(f"{source}: {error.message}", hint=error.hint) from error
