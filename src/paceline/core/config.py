"""Frozen configs that round-trip to TOML and report every mistake at once.

A config is a frozen dataclass deriving from `Config`. Its fields are bool, int, float, str,
`Literal`s, tuples of these, other configs, tables whose keys are the user's own, or any of these or
None. An absent key means the default; an unknown key is a problem whose hint lists near names.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import tomllib
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import tomli_w

from paceline.core.errors import ConfigError, Problem, UsageError, name_hint

C = TypeVar("C", bound="Config")


class TextTable(Mapping[str, str]):
    """A table of texts under names that are the user's own; like a config it never changes.

    Args:
        texts: name to text.
    """

    __slots__ = ("_texts",)

    def __init__(self, texts: Mapping[str, str] | None = None) -> None:
        self._texts = dict(texts or {})

    def __getitem__(self, name: str) -> str:
        return self._texts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._texts)

    def __len__(self) -> int:
        return len(self._texts)

    def __hash__(self) -> int:
        return hash(frozenset(self._texts.items()))

    def __repr__(self) -> str:
        return f"TextTable({self._texts!r})"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Base of all configs.

    A field that is a config may be given as plain data: ``Plan(mesh={"dp_shard": 2})``.
    """

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Mapping):
                hint = get_type_hints(type(self))[field.name]
                data = cast("Mapping[str, Any]", value)
                if (table := _config_in(hint)) is not None:
                    object.__setattr__(self, field.name, table.from_dict(data, source=field.name))
                elif hint is TextTable:
                    object.__setattr__(self, field.name, TextTable(data))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, source: str = "") -> Self:
        """Builds the config from plain data.

        Raises:
            ConfigError: unknown keys and values of a wrong type, all of them.
        """
        config, problems = cls.parse(data)
        if config is None or problems:
            raise ConfigError(problems, source=source)
        return config

    @classmethod
    def parse(cls, data: Mapping[str, Any]) -> tuple[Self | None, list[Problem]]:
        """The config with defaults in place of what cannot be read, and why that cannot.

        None in place of a config that lacks a required key.
        """
        problems: list[Problem] = []
        return _parse_table(cls, data, "", problems), problems

    @classmethod
    def from_toml(cls, path: str | Path) -> Self:
        """Reads the config from a TOML file.

        Raises:
            UsageError: there is no such file, or it is not TOML.
            ConfigError: see `from_dict`.
        """
        return cls.from_dict(read_toml(path), source=str(path))

    def to_dict(self) -> dict[str, Any]:
        """Plain data without the keys that are None, so that `from_dict` gives `self` back."""
        return plain(self)

    def to_toml(self) -> str:
        return tomli_w.dumps(self.to_dict())

    def with_overrides(self, assignments: Sequence[str], *, source: str = "--set") -> Self:
        """A copy with ``a.b=value`` assignments applied; values are TOML, or else bare text."""
        return type(self).from_dict(assign(self.to_dict(), assignments, source), source=source)


def assign(
    data: Mapping[str, Any], assignments: Sequence[str], source: str = "--set"
) -> dict[str, Any]:
    """Plain data of a config with ``a.b=value`` assignments applied, as `Config.with_overrides`.

    Raises:
        UsageError: what is no assignment.
        ConfigError: an assignment into what is no table.
    """
    changed = copy.deepcopy(dict(data))
    for assignment in assignments:
        keys, value = _parse_assignment(assignment)
        _table_at(changed, keys[:-1], source)[keys[-1]] = value
    return changed


def read_toml(path: str | Path) -> dict[str, Any]:
    """Reads a TOML file, with errors that name it."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not TOML: {error}") from error


def _parse_assignment(text: str) -> tuple[list[str], Any]:
    key, separator, value = text.partition("=")
    keys = key.strip().split(".")
    if not separator or not all(keys):
        raise UsageError(f"cannot read the assignment {text!r}", hint="write a.b=value")
    try:
        return keys, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return keys, value.strip()


def _table_at(data: dict[str, Any], keys: Sequence[str], source: str) -> dict[str, Any]:
    """The table that a path leads to, made if need be."""
    for depth, key in enumerate(keys):
        found = data.setdefault(key, {})
        if not isinstance(found, dict):
            path, rule = ".".join(keys[: depth + 1]), "is a value, not a table"
            raise ConfigError([Problem(path, _show(found), rule)], source=source)
        data = cast("dict[str, Any]", found)
    return data


def plain(value: Any) -> Any:
    """A config, or a value of one, as JSON and TOML know it."""
    if isinstance(value, Config):
        items = ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value))
        return {name: plain(item) for name, item in items if item is not None}
    if isinstance(value, tuple):
        return [plain(item) for item in cast("tuple[Any, ...]", value)]
    return dict(value) if isinstance(value, TextTable) else value


def _parse_table(
    cls: type[C], data: Mapping[str, Any], path: str, problems: list[Problem]
) -> C | None:
    """The config without what cannot be read, or None; the reasons are appended to `problems`."""
    hints = get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls)]
    values: dict[str, Any] = {}
    for key, value in data.items():
        where = f"{path}.{key}" if path else key
        if key in names:
            before = len(problems)
            parsed = _parse_value(hints[key], value, where, problems)
            if len(problems) == before or isinstance(parsed, Config):
                values[key] = parsed
        else:
            problems.append(Problem(where, _show(value), "unknown key", name_hint(key, names)))
    required = [
        field.name
        for field in dataclasses.fields(cls)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    for name in (name for name in required if name not in data):
        where = f"{path}.{name}" if path else name
        problems.append(Problem(where, "(absent)", "is required"))
    return cls(**values) if all(name in values for name in required) else None


def _parse_value(hint: Any, value: Any, path: str, problems: list[Problem]) -> Any:
    table = _config_in(hint)
    if table is not None and not (value is None and _matches(hint, None)):
        if isinstance(value, Mapping):
            return _parse_table(table, cast("Mapping[str, Any]", value), path, problems)
        problems.append(Problem(path, _show(value), "must be a table"))
        return None
    if _matches(hint, value):
        return _convert(hint, value)
    rule = f"must be {_describe(hint)}"
    choices = [choice for choice in _choices(hint) if isinstance(choice, str)]
    near = name_hint(value, choices) if isinstance(value, str) and choices else ""
    problems.append(Problem(path, _show(value), rule, near))
    return None


def _config_in(hint: Any) -> type[Config] | None:
    """The config that a field holds, if it holds one."""
    found = (m for m in _members(hint) if isinstance(m, type) and issubclass(m, Config))
    return next(found, None)


def _members(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _choices(hint: Any) -> tuple[Any, ...]:
    literals = (member for member in _members(hint) if get_origin(member) is Literal)
    return tuple(choice for literal in literals for choice in get_args(literal))


def _matches(hint: Any, value: Any) -> bool:
    members = _members(hint)
    if len(members) > 1:
        return any(_matches(member, value) for member in members)
    if get_origin(hint) is Literal:
        return any(value == c and type(value) is type(c) for c in get_args(hint))
    if get_origin(hint) is tuple:
        item_hint = get_args(hint)[0]
        return isinstance(value, list | tuple) and all(
            _matches(item_hint, item) for item in cast("Sequence[Any]", value)
        )
    if hint is TextTable:
        return isinstance(value, Mapping) and all(
            isinstance(part, str)
            for item in cast("Mapping[Any, Any]", value).items()
            for part in item
        )
    if hint is type(None):
        return value is None
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is hint


def _convert(hint: Any, value: Any) -> Any:
    hint = next(member for member in _members(hint) if _matches(member, value))
    if get_origin(hint) is tuple:
        return tuple(_convert(get_args(hint)[0], item) for item in value)
    if hint is TextTable:
        return TextTable(value)
    return float(value) if hint is float else value


def _describe(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(_show(choice) for choice in get_args(hint))
    if get_origin(hint) is tuple:
        return f"a list, each {_describe(get_args(hint)[0])}"
    if hint is TextTable:
        return "a table whose values are texts"
    members = [member for member in _members(hint) if member is not type(None)]
    if len(members) > 1 or len(members) < len(_members(hint)):
        return " or ".join(_describe(member) for member in members)
    nouns = {bool: "true or false", int: "an integer", float: "a number", str: "a text"}
    return nouns.get(hint, str(hint))


def _show(value: Any) -> str:
    try:
        return json.dumps(value)
    except TypeError:
        return str(value)
