"""The exception tree. Every error that a user can cause derives from `PacelineError`.

    PacelineError            exit code 1: the run failed, or a check did
    ├── UsageError           exit code 2: a command, path or value that cannot be used
    │   ├── ConfigError      one or more `Problem`s in a plan or another config
    │   ├── UnknownNameError a name that is not in a table, with near ones
    │   └── MissingExtraError a dependency that an extra would install
    ├── DataError            a file whose content is broken
    ├── RankError            a rank of a parallel run failed or disagreed
    └── RequestError         a request that a server answers with a 4xx

A message says what was found and which rule it breaks; `hint` says the way out.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass


class PacelineError(Exception):
    """Base of all errors of this package.

    Args:
        message: what was found, where, and the rule that it breaks.
        hint: the way out, shown on a line of its own.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\nhint: {self.hint}" if self.hint else self.message


class UsageError(PacelineError):
    """A command, path or value that cannot be used."""

    exit_code = 2


@dataclass(frozen=True, slots=True)
class Problem:
    """One rule that a config breaks, as data.

    Attributes:
        path: dotted path of the offending key, for example ``mesh.tp``.
        value: the value found there, as text.
        rule: what must hold.
        hint: what to do instead.
    """

    path: str
    value: str
    rule: str
    hint: str = ""

    def __str__(self) -> str:
        text = f"{self.path} = {self.value}: {self.rule}"
        return f"{text}\n  hint: {self.hint}" if self.hint else text

    def to_dict(self) -> dict[str, str]:
        return asdict(self)


class ConfigError(UsageError):
    """A config that breaks rules; carries all of them."""

    def __init__(self, problems: Sequence[Problem], *, source: str = "") -> None:
        self.problems = tuple(problems)
        where = f" in {source}" if source else ""
        noun = "problem" if len(self.problems) == 1 else "problems"
        lines = "\n".join(str(problem) for problem in self.problems)
        super().__init__(f"{len(self.problems)} {noun}{where}:\n{lines}")


class UnknownNameError(UsageError, KeyError):
    """A name that no table holds; a KeyError too, as a mapping's lookup raises."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        self.name = name
        super().__init__(f"unknown {kind} {name!r}", hint=name_hint(name, known))


class MissingExtraError(UsageError):
    """An optional dependency that is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed", hint=f"pip install 'paceline[{extra}]'")


class DataError(PacelineError):
    """A file whose content is broken: truncated, of another format, or failing its checksum."""


class RankError(PacelineError):
    """A rank of a parallel run failed, hung or disagreed with the others.

    Args:
        message: which rank, where it is on the mesh, and why.
        hint: the way out.
        exit_code: that of the rank, where its error has one.
        ranks: whose fault it is, where that is known.
        comes_again: whether another start would come to the same: an error of usage, of data, or
            of numbers that are not finite.
    """

    def __init__(
        self,
        message: str,
        *,
        hint: str = "",
        exit_code: int = 1,
        ranks: tuple[int, ...] = (),
        comes_again: bool = False,
    ) -> None:
        super().__init__(message, hint=hint)
        self.exit_code = exit_code
        self.ranks = ranks
        self.comes_again = comes_again


class RequestError(PacelineError):
    """A request that cannot be served; a server answers it with `status` and lives.

    Args:
        message: what is wrong with the request.
        param: the field at fault, if there is one.
        status: HTTP status, 400 to 499.
    """

    exit_code = 2

    def __init__(
        self, message: str, *, param: str | None = None, status: int = 400, hint: str = ""
    ) -> None:
        super().__init__(message, hint=hint)
        self.param = param
        self.status = status


def name_hint(name: str, known: Iterable[str]) -> str:
    """A hint that lists the names nearest to `name`, or all of them if none is near."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    return f"did you mean {' or '.join(near)}?" if near else f"one of {', '.join(known)}"
