"""The contract of parameter-efficient fine-tuning."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import Tensor

from paceline.models.decoder import Decoder
from paceline.models.peft.names import FileNames
from paceline.models.peft.options import FileOptions
from paceline.models.peft.update import Update
from paceline.models.weights import Weights
from paceline.plan.model_spec import ModelSpec
from paceline.plan.plan import PeftConfig


@dataclass(frozen=True, slots=True)
class Origin:
    """What start values depend on, besides their names.

    Attributes:
        spec: sizes of the model.
        weights: the model's own.
        seed: of what is random.
    """

    spec: ModelSpec
    weights: Weights
    seed: int


class Method(ABC):
    """What is added to a model, how it begins, and how it lies in files.

    Args:
        config: its ``method`` is this one.

    Attributes:
        file_type: what an adapter_config.json calls the method.
        why_unmerged: why its parameters cannot become part of the model's own; empty if they can.
        why_alone: why rows of one pass cannot differ in it; empty if they can.
    """

    file_type: ClassVar[str]
    why_unmerged: ClassVar[str] = ""
    why_alone: ClassVar[str] = ""

    def __init__(self, config: PeftConfig) -> None:
        self.config = config

    @abstractmethod
    def attach(self, model: Decoder) -> None:
        """Adds the new parameters to a model of the meta device, in place.

        The names of the parameters that are there, and their order, stay as they are.

        Raises:
            ConfigError: a target that matches nothing.
        """

    @abstractmethod
    def start(self, name: str, shape: tuple[int, ...], origin: Origin) -> Tensor:
        """The value that a new parameter begins with.

        Args:
            name: of the parameter.
            shape: of the parameter.
            origin: what the value may depend on.
        """

    def merge(self, kind: str, value: Tensor, module: str, added: Weights) -> Tensor:  # noqa: ARG002
        """The ``weight`` or ``bias`` of an adapted module with what was added worked into it.

        Asked of methods alone whose parameters can become part of the model's.

        Args:
            kind: of the parameter.
            value: of the parameter, in float32 or wider.
            module: its name.
            added: the new parameters.
        """
        return value

    def update(self, module: str, own: Weights, has_bias: bool, added: Weights) -> Update:  # noqa: ARG002
        """What it makes of an adapted module's product, at least in float32.

        Asked of methods alone that rows of one pass can differ in.

        Args:
            module: its name.
            own: the model's weights.
            has_bias: whether the module has one.
            added: the new parameters.
        """
        raise AssertionError(f"{self.config.method} has no update of {module}: {self.why_alone}")

    def targets(self, model: Decoder) -> list[str]:  # noqa: ARG002
        """The modules of a model that are adapted, if the method adapts some.

        Raises:
            ConfigError: a target that matches nothing.
        """
        return []

    # Files

    @abstractmethod
    def file_key(self, name: str, names: FileNames) -> str:
        """What files call a new parameter.

        Raises:
            UsageError: files cannot hold it.
        """

    def file_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:  # noqa: ARG002
        """The shape of a new parameter in files; its numbers are in the same order."""
        return shape

    @abstractmethod
    def file_config(self, names: FileNames, targets: list[str]) -> dict[str, Any]:
        """What an adapter_config.json says beside the base model and the type.

        Args:
            names: of the model's modules in files.
            targets: the modules that are adapted, under our names.
        """

    @classmethod
    @abstractmethod
    def from_file(cls, options: FileOptions, names: FileNames) -> Self:
        """The method that an adapter_config.json describes.

        Args:
            options: of the file; what is taken from them is computed as they say.
            names: of the model's modules in files.

        Raises:
            UsageError: an option that is not computed here.
            DataError: an option that makes no sense.
        """
