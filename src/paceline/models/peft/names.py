"""Modules under our names and under the published ones, by which an adapter's files go."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

from paceline.core.errors import UsageError
from paceline.models.families import family
from paceline.models.families.base import Stored
from paceline.models.linear import Linear
from paceline.models.peft.options import FileOptions
from paceline.models.weights import build
from paceline.plan.model_spec import ModelSpec

_LAYER = re.compile(r"blocks\.(\d+)\.")


class FileNames:
    """The linear layers of a model, and what files call them.

    Args:
        spec: of the model.

    Attributes:
        spec: of the model.
        has_inputs_first: whether the family's files have the inputs of matrices as rows.
    """

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        stored: dict[str, Stored] = family(spec.family).weight_map(spec)
        places = {name: stored[f"{name}.weight"] for name in candidates(build(spec))}
        self.has_inputs_first = any(place.is_transposed for place in places.values())
        self._published = {
            name: place.names[0].removesuffix(".weight") for name, place in places.items()
        }
        self._fused = {name for name, place in places.items() if place.rows is not None}

    def published(self, module: str) -> str:
        """What files call a module.

        Raises:
            UsageError: it is a part of a larger one there.
        """
        if module in self._fused:
            raise UsageError(
                f"{module} is a part of {self._published[module]} in this family's files, in which "
                "an adapter's format knows the whole alone",
                hint="checkpoint export --merge, or peft.targets without it",
            )
        return self._published[module]

    def listed(self, modules: Iterable[str]) -> list[str]:
        """Published names for an adapter_config.json: the last parts, where they say enough."""
        modules = list(modules)
        whole = [self.published(module) for module in modules]
        short = sorted({name.rpartition(".")[2] for name in whole})
        return short if self.matching(short) == modules else whole

    def matching(self, patterns: str | list[str]) -> list[str]:
        """The modules that an adapter_config.json means, as `peft` reads it.

        Args:
            patterns: ends of published names, or one regular expression of whole ones.

        Raises:
            UsageError: they mean a module of which we have parts.
        """
        found = [name for name, file in self._published.items() if _matches(file, patterns)]
        for name in found:
            self.published(name)
        return found

    def targets(self, options: FileOptions) -> tuple[str, ...]:
        """The modules that a file's options say are adapted.

        Raises:
            UsageError: none of this model's, or one of which we have parts.
        """
        patterns = options.take_names("target_modules")
        layers = options.take_layers("layers_to_transform")
        options.require("layers_pattern", "layers", ["layers"], [])
        found = self.matching(patterns)
        if layers is not None:
            found = [name for name in found if (at := _LAYER.match(name)) and int(at[1]) in layers]
        if not found:
            raise UsageError(
                f"{options.path}: target_modules = {patterns!r} names no layer of a "
                f"{self.spec.family} model",
                hint="the adapter belongs to another model",
            )
        return tuple(found)


def candidates(model: nn.Module) -> list[str]:
    """The linear layers that can be adapted: all but the routers of experts."""
    found = [name for name, module in model.named_modules() if isinstance(module, Linear)]
    return [name for name in found if not name.endswith(".router")]


def _matches(published: str, patterns: str | list[str]) -> bool:
    if isinstance(patterns, str):
        return re.fullmatch(patterns, published) is not None
    return any(published == name or published.endswith(f".{name}") for name in patterns)
