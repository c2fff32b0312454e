"""What is installed, beside what this package's metadata asks for. Imports none of it."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

_NAME = "paceline"


@dataclass(frozen=True, slots=True)
class Package:
    """A dependency.

    Attributes:
        name: of the distribution.
        supported: range of versions, for example ``>=2.11,<2.14``.
        installed: version, or None.
    """

    name: str
    supported: str
    installed: str | None

    @property
    def problem(self) -> str:
        """What is wrong with it, or nothing."""
        if self.installed is None:
            return f"{self.name} is not installed"
        if not SpecifierSet(self.supported).contains(self.installed, prereleases=True):
            return f"{self.name} {self.installed} is outside {self.supported}"
        return ""


def python() -> Package:
    """The interpreter, as if it were a package."""
    wanted = metadata.metadata(_NAME).get_all("Requires-Python") or [""]
    return Package("python", _in_words(SpecifierSet(wanted[0])), platform.python_version())


def dependencies() -> list[Package]:
    """What the package needs to run at all.

    Raises:
        PackageNotFoundError: the package itself is not installed, only on the path.
    """
    return [_package(r) for r in _requirements() if r.marker is None or r.marker.evaluate()]


def extras() -> dict[str, list[Package]]:
    """Extra to what it adds."""
    names = metadata.metadata(_NAME).get_all("Provides-Extra") or []
    return {name: [_package(r) for r in _requirements() if _is_of(r, name)] for name in names}


def _is_of(requirement: Requirement, extra: str) -> bool:
    marker = requirement.marker
    is_added = marker is not None and marker.evaluate({"extra": extra}) and not marker.evaluate()
    return is_added and requirement.name != _NAME


def _requirements() -> list[Requirement]:
    return [Requirement(text) for text in metadata.requires(_NAME) or []]


def _package(requirement: Requirement) -> Package:
    supported = _in_words(requirement.specifier)
    return Package(requirement.name, supported, installed_version(requirement.name))


def _in_words(specifier: SpecifierSet) -> str:
    """The lower bound first."""
    return ",".join(sorted((str(part) for part in specifier), reverse=True))


def installed_version(name: str) -> str | None:
    """The version of a distribution, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
