"""What processes of one engine tell each other: frozen dataclasses as JSON, each of a known type.

A message is plain data on its way, so that whoever reads it makes nothing else of it than what its
types name. What the dataclasses gain, the wire carries: their fields are all that it knows.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import socket
import struct
import types
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Mapping as AbstractMapping
from collections.abc import Sequence as AbstractSequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from paceline.core.errors import DataError

MAX_BYTES = 1 << 28
"""Of a message; a longer one is a broken one."""
_LENGTH = struct.Struct(">Q")
_SCALARS = (bool, int, float, str, type(None))


class Line:
    """One end of a connection that messages go over.

    Args:
        connection: a stream; the line owns it.
        heard: the messages that may come, by the name that each goes under.
        told: those that may be sent.
    """

    def __init__(
        self, connection: socket.socket, heard: Mapping[str, type], told: Mapping[str, type]
    ) -> None:
        self.connection = connection
        self._heard = heard
        self._names = {kind: name for name, kind in told.items()}

    def send(self, message: object) -> None:
        """Sends a message.

        Raises:
            OSError: the other end is gone, or has not read for the connection's timeout.
        """
        self.connection.sendall(packed([self._names[type(message)], to_plain(message)]))

    def receive(self) -> Any:
        """The next message.

        Raises:
            EOFError: the other end is gone.
            TimeoutError: it has not come in the connection's timeout.
            DataError: it is none of those that may come.
        """
        (length,) = _LENGTH.unpack(self._read(_LENGTH.size))
        if length > MAX_BYTES:
            raise DataError(f"a message of {length} bytes, and {MAX_BYTES} is the most")
        name, plain = json.loads(self._read(length))
        if name not in self._heard:
            raise DataError(f"no message is called {name!r}")
        return from_plain(self._heard[name], plain, name)

    def close(self) -> None:
        self.connection.close()

    def _read(self, length: int) -> bytes:
        data = bytearray()
        while len(data) < length:
            try:
                part = self.connection.recv(min(length - len(data), 1 << 20))
            except ConnectionError as error:
                raise EOFError("the other end is gone") from error
            if not part:
                raise EOFError("the other end is gone")
            data += part
        return bytes(data)


def packed(value: object) -> bytes:
    """Plain data with its length before it."""
    data = json.dumps(value, separators=(",", ":")).encode()
    return _LENGTH.pack(len(data)) + data


def to_plain(value: object) -> Any:
    """Plain data of a dataclass and what it holds; a field that has its default is left out.

    Raises:
        TypeError: something that is no plain data.
    """
    if type(value) in _SCALARS:
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {name: to_plain(held) for name, held in _said(value)}
    if isinstance(value, AbstractMapping):
        return [[to_plain(key), to_plain(held)] for key, held in value.items()]
    if isinstance(value, AbstractSequence) and not isinstance(value, str | bytes):
        return [to_plain(held) for held in value]
    raise TypeError(f"{type(value).__name__} is no plain data")


def _said(value: Any) -> Iterator[tuple[str, object]]:
    for field in dataclasses.fields(value):
        held = getattr(value, field.name)
        if field.default is dataclasses.MISSING or held != field.default:
            yield field.name, held


def from_plain(hint: Any, data: Any, path: str = "") -> Any:
    """The value of a type that plain data stands for; the inverse of `to_plain`.

    Args:
        hint: a dataclass, a scalar, or a tuple, sequence, mapping, literal or union of such.
        data: as JSON gives it.
        path: of the value, for errors.

    Raises:
        DataError: it does not stand for one.
    """
    origin, members = get_origin(hint), get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _dataclass_of(hint, data, path)
    if origin in (Union, types.UnionType):
        return _one_of(members, data, path)
    if origin is Literal and any(type(data) is type(m) and data == m for m in members):
        return data
    if origin in (tuple, list, AbstractSequence) and type(data) is list:
        return _sequence_of(origin, members, data, path)
    if origin in (dict, AbstractMapping) and _are_pairs(data):
        key, held = members
        return {from_plain(key, k, path): from_plain(held, v, f"{path}[{k}]") for k, v in data}
    if hint is float and type(data) in (int, float):
        return float(data)
    if hint in _SCALARS and type(data) is hint:
        return data
    raise DataError(f"{path}: {type(data).__name__} stands for no {hint}")


def _dataclass_of(kind: type, data: Any, path: str) -> Any:
    hints = _hints(kind)
    if type(data) is not dict or not data.keys() <= hints.keys():
        raise DataError(f"{path}: stands for no {kind.__name__}")
    held = {name: from_plain(hints[name], part, f"{path}.{name}") for name, part in data.items()}
    try:
        return kind(**held)
    except TypeError as error:
        raise DataError(f"{path}: {error}") from error


@functools.cache
def _hints(kind: type) -> Mapping[str, Any]:
    return get_type_hints(kind)


def _one_of(members: tuple[Any, ...], data: Any, path: str) -> Any:
    if data is None and type(None) in members:
        return None
    problems: list[str] = []
    for member in members:
        if member is not type(None):
            try:
                return from_plain(member, data, path)
            except DataError as error:
                problems.append(error.message)
    raise DataError("; ".join(problems))


def _sequence_of(origin: Any, members: tuple[Any, ...], data: list[Any], path: str) -> Any:
    is_fixed = origin is tuple and members[-1:] != (Ellipsis,)
    if is_fixed and len(members) != len(data):
        raise DataError(f"{path}: has {len(data)} parts, not {len(members)}")
    hints: Sequence[Any] = members if is_fixed else [members[0]] * len(data)
    parts = [
        from_plain(hint, part, f"{path}[{index}]")
        for index, (hint, part) in enumerate(zip(hints, data, strict=True))
    ]
    return parts if origin is list else tuple(parts)


def _are_pairs(data: Any) -> bool:
    return type(data) is list and all(type(pair) is list and len(pair) == 2 for pair in data)
