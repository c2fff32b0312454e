"""Adapters by name: what a request may ask for, and what its `model` field means."""

from __future__ import annotations

from collections.abc import Collection

from paceline.core.errors import RequestError, UsageError


def adapter_named(model: str, model_name: str, adapters: Collection[str]) -> str:
    """The adapter that a request's `model` field asks for; empty for the model itself.

    Args:
        model: the field.
        model_name: what clients call the model itself.
        adapters: names of those beside it.

    Raises:
        RequestError: neither the model nor an adapter of it.
    """
    if model == model_name:
        return ""
    if model not in adapters:
        raise RequestError(
            f"no model {model!r}",
            param="model",
            status=404,
            hint=f"one of {', '.join((model_name, *sorted(adapters)))}",
        )
    return model


def require_adapter(name: str, adapters: Collection[str]) -> None:
    """Raises RequestError for an adapter that is not served.

    Args:
        name: that a request gives; empty for none.
        adapters: the names that there are.
    """
    if name and name not in adapters:
        known = f"one of {', '.join(sorted(adapters))}" if adapters else "this engine has none"
        raise RequestError(f"no adapter {name!r}", param="model", status=404, hint=known)


def require_names_apart(model_name: str, adapters: Collection[str]) -> None:
    """Raises UsageError where an adapter is called what the model itself is called."""
    if model_name in adapters:
        raise UsageError(
            f"{model_name!r} is the model's name and that of one of its adapters",
            hint="--served-model-name, or another name in serve.adapters",
        )
