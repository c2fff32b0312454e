"""The options of an adapter_config.json, every one of which is heeded or refused."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from paceline.core.errors import DataError, UsageError

_NEUTRAL: tuple[Any, ...] = (None, False, [], {}, "")


class FileOptions:
    """Options that are taken one by one; those that are left must not change what is computed.

    Args:
        path: of the file, for errors.
        values: what it holds.
    """

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self.path = path
        self._left = dict(values)

    def take_int(self, key: str) -> int:
        """A count; raises DataError if it is absent or not positive."""
        value = self._left.pop(key, None)
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise DataError(f"{self.path}: {key} = {value!r}: must be a positive integer")
        return value

    def take_float(self, key: str) -> float:
        """A number; raises DataError if it is absent, or not positive and finite."""
        value = self._left.pop(key, None)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise DataError(f"{self.path}: {key} = {value!r}: must be a number")
        if not 0 < value < math.inf:
            raise DataError(f"{self.path}: {key} = {value!r}: must be positive and finite")
        return float(value)

    def take_switch(self, key: str) -> bool:
        """Whether an option is on, which it is not where it is absent."""
        value = self._left.pop(key, None)
        if value not in (None, True, False):
            raise DataError(f"{self.path}: {key} = {value!r}: must be true or false")
        return bool(value)

    def take_text(self, key: str) -> str:
        """An option that is a text; raises DataError if it is none."""
        value = self._left.pop(key, None)
        if not isinstance(value, str):
            raise DataError(f"{self.path}: {key} = {value!r}: must be a text")
        return value

    def take_names(self, key: str) -> str | list[str]:
        """An option that is a list of names, or one regular expression.

        Raises:
            DataError: it is neither.
        """
        value = self._left.pop(key, None)
        if isinstance(value, str):
            try:
                re.compile(value)
            except re.error as error:
                raise DataError(f"{self.path}: {key} = {value!r}: {error}") from error
            return value
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise DataError(f"{self.path}: {key} = {value!r}: must be a list of names")
        return value

    def take_layers(self, key: str) -> set[int] | None:
        """An option that names one layer or several, or None for all.

        Raises:
            DataError: it is neither.
        """
        value = self._left.pop(key, None)
        if value is None:
            return None
        layers = value if isinstance(value, list) else [value]
        if not all(type(layer) is int for layer in layers):
            raise DataError(f"{self.path}: {key} = {value!r}: must be layer numbers")
        return set(layers)

    def require(self, key: str, *allowed: Any) -> None:
        """Raises UsageError where an option has a value that is not computed here."""
        value = self._left.pop(key, None)
        if value is not None and value not in allowed:
            raise UsageError(f"{self.path}: {key} = {value!r} is not built in this version")

    def require_model(self, key: str, expected: int) -> None:
        """Raises UsageError where an option states a size that is not the model's."""
        value = self._left.pop(key, None)
        if value is not None and value != expected:
            raise UsageError(
                f"{self.path}: {key} = {value!r}, but the model's is {expected}",
                hint="the adapter belongs to another model",
            )

    def ignore(self, *keys: str) -> None:
        """Drops options that do not change what a trained adapter computes."""
        for key in keys:
            self._left.pop(key, None)

    def refuse_rest(self) -> None:
        """Raises UsageError for the first option left that is switched on."""
        for key, value in self._left.items():
            if value not in _NEUTRAL:
                raise UsageError(f"{self.path}: {key} = {value!r} is not built in this version")
