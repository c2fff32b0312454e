"""The names of torch's functions without the marks of their operator and in-place forms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_IN_PLACE = ("__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__idiv__")
_OPERATORS = {
    "__add__": "add",
    "__radd__": "add",
    "__iadd__": "add",
    "__sub__": "sub",
    "__rsub__": "sub",
    "__isub__": "sub",
    "__mul__": "mul",
    "__rmul__": "mul",
    "__imul__": "mul",
    "__truediv__": "div",
    "__rtruediv__": "div",
    "__itruediv__": "div",
    "__rdiv__": "div",
    "__idiv__": "div",
    "__pow__": "pow",
    "__rpow__": "pow",
    "__neg__": "neg",
    "__matmul__": "matmul",
    "__rmatmul__": "matmul",
}


def plain_name(function: Callable[..., Any]) -> str:
    """A function's name without the marks of its in-place and operator forms."""
    name = getattr(function, "__name__", "")
    if name == "__get__":  # a property
        return getattr(getattr(function, "__self__", None), "__name__", "")
    return _OPERATORS.get(name, name.rstrip("_") if not name.startswith("__") else name)


def is_in_place(function: Callable[..., Any]) -> bool:
    """Whether a function changes its first argument, by the custom of torch's names."""
    name = getattr(function, "__name__", "")
    return name in _IN_PLACE or (name.endswith("_") and not name.startswith("__"))
