"""What methods share that adapt linear layers: which ones, under which names, in which files."""

from __future__ import annotations

from abc import abstractmethod
from fnmatch import fnmatchcase
from typing import ClassVar

from torch import nn

from paceline.core.errors import ConfigError, Problem, name_hint
from paceline.models.decoder import Decoder
from paceline.models.linear import Linear
from paceline.models.peft.base import Method
from paceline.models.peft.names import FileNames, candidates

FILE_PREFIX = "base_model.model."


class AdaptedLinear(Linear):
    """A linear layer with new parameters beside its own, which keep their names.

    Args:
        base: gives its parameters away.
    """

    def __init__(self, base: Linear) -> None:
        nn.Module.__init__(self)  # torch's own would make parameters, and fill them
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight = base.weight
        self.register_parameter("bias", base.bias)

    def new_parameter(self, *shape: int) -> nn.Parameter:
        """A parameter on the device and in the dtype of the weight."""
        return nn.Parameter(self.weight.new_empty(shape))


class LinearMethod(Method):
    """A method that replaces linear layers with adapted ones.

    Attributes:
        usual_targets: patterns of the modules that are adapted where the plan names none.
        file_names: a new parameter's name in its module to that in files.
    """

    usual_targets: ClassVar[tuple[str, ...]]
    file_names: ClassVar[dict[str, str]]

    @abstractmethod
    def adapt(self, name: str, base: Linear) -> AdaptedLinear:
        """The adapted layer in place of one that is called `name`."""

    def attach(self, model: Decoder) -> None:
        for name in self.targets(model):
            parent, _, leaf = name.rpartition(".")
            linear = model.get_submodule(name)
            assert isinstance(linear, Linear)
            setattr(model.get_submodule(parent), leaf, self.adapt(name, linear))

    def targets(self, model: Decoder) -> list[str]:
        names = candidates(model)
        for pattern in self.config.targets:
            if not any(fnmatchcase(name, pattern) for name in names):
                rule, hint = "matches no linear layer that can be adapted", _near(pattern, names)
                raise ConfigError([Problem("peft.targets", pattern, rule, hint)])
        patterns = self.config.targets or self.usual_targets
        return [name for name in names if any(fnmatchcase(name, one) for one in patterns)]

    def file_key(self, name: str, names: FileNames) -> str:
        module, _, part = name.rpartition(".")
        return f"{FILE_PREFIX}{names.published(module)}.{self.file_names[part]}"


def _near(pattern: str, names: list[str]) -> str:
    """A hint that lists names like the pattern; those of the first block stand for all."""
    return name_hint(pattern, [name for name in names if name.startswith(("blocks.0.", "head"))])
