"""Name tables: how a name in a plan or on a command line becomes an implementation.

A family (a folder of techniques behind one contract) holds one literal table from name to
``"module:attribute"``. The module is imported when the name is asked for, so a table costs
nothing to import and a search for the name finds its file.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import Any

from paceline.core.errors import UnknownNameError


class NameTable(Mapping[str, str]):
    """A lazy table of one family.

    Args:
        kind: what an entry is called in errors, for example "pipeline schedule".
        entries: name to ``"module:attribute"``.
    """

    def __init__(self, kind: str, entries: Mapping[str, str]) -> None:
        self.kind = kind
        self._entries = dict(entries)

    def __getitem__(self, name: str) -> str:
        if name not in self._entries:
            raise UnknownNameError(self.kind, name, self._entries)
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def load(self, name: str) -> Any:
        """Imports and returns the implementation.

        Raises:
            UnknownNameError: no such name; the hint lists near ones.
        """
        module_name, attribute = self[name].split(":")
        return getattr(importlib.import_module(module_name), attribute)
