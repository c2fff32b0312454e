"""Counts that a module keeps of its heads and widths, made those of one rank's part.

Modules cut heads apart by counts that they have been given: ``num_heads``, ``split_size``, a
config. Which of them matter no graph can say. So ways are tried, the likeliest first, until the
parts are proved to sum up to the whole.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

Undo = Callable[[], None]

_WIDTH_WORDS = ("dim", "size", "width", "hidden", "embed", "features")


def changes(
    module: nn.Module, counts: Mapping[str, tuple[int, int]], widths: Mapping[int, int]
) -> Iterator[dict[str, Any]]:
    """Ways to set attributes of a module.

    Counts of heads come first, whether or not one call has needed them: with other masks another
    one may.

    Args:
        module: the one that calls a group's layers.
        counts: ``heads``, ``keys`` and ``group`` (heads on one key head) to their number in the
            whole module and in one rank's part.
        widths: of the whole module's layers to those of the part's.
    """
    plain = {name: value for name, value in vars(module).items() if type(value) is int}
    of_heads = _counted(plain, counts)
    of_widths = {
        name: widths[value]
        for name, value in plain.items()
        if value in widths and name not in of_heads and _is_width(name)
    }
    yield of_heads
    if of_widths:
        yield of_heads | of_widths
    if config := _config(module, counts):
        yield of_heads | {"config": config}
        if of_widths:
            yield of_heads | of_widths | {"config": config}
    if of_heads:
        yield {}


def set_attributes(module: nn.Module, values: Mapping[str, Any]) -> Undo:
    """Sets them, and returns what sets them back."""
    before = {name: getattr(module, name) for name in values}
    for name, value in values.items():
        setattr(module, name, value)

    def undo() -> None:
        for name, value in before.items():
            setattr(module, name, value)

    return undo


def _counted(values: Mapping[str, int], counts: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    """Those that count heads to the part's numbers."""
    return {name: part for name, value in values.items() if (part := _count(name, value, counts))}


def _count(name: str, value: int, counts: Mapping[str, tuple[int, int]]) -> int | None:
    """The part's number for an attribute that counts heads; None if it does not."""
    if not ("head" in name or "group" in name) or any(word in name for word in _WIDTH_WORDS):
        return None
    kind = "group" if "group" in name else "keys" if "kv" in name or "key" in name else "heads"
    whole, part = counts.get(kind, (None, 0))
    return part if value == whole else None


def _is_width(name: str) -> bool:
    return any(word in name for word in _WIDTH_WORDS) and not name.startswith("head_")


def _config(module: nn.Module, counts: Mapping[str, tuple[int, int]]) -> Any:
    """A copy of the module's config with the part's heads; None where it has none."""
    config = getattr(module, "config", None)
    if config is None or not hasattr(config, "__dict__"):
        return None
    plain = {name: value for name, value in vars(config).items() if type(value) is int}
    of_heads = _counted(plain, counts)
    if not of_heads:
        return None
    changed = copy.copy(config)
    for name, value in of_heads.items():
        setattr(changed, name, value)
    return changed
