"""Nothing is added: the model's own parameters are trained, all or those that are not frozen.

Source: Howard and Ruder, Universal Language Model Fine-tuning, arXiv:1801.06146, Sec. 3.3.
Replaces: nothing, it is the default.  Needs: nothing.  Forbids: nothing.
Cost: gradients and optimizer state of the model's size.
Differs: all layers at once; no gradual unfreezing (``train.freeze`` names what stays).
"""

# ruff: noqa: ARG002, ARG003 (arguments are the contract's)
from __future__ import annotations

from typing import Any, NoReturn, Self

from torch import Tensor

from paceline.core.errors import UsageError
from paceline.models.decoder import Decoder
from paceline.models.peft.base import Method, Origin
from paceline.models.peft.names import FileNames
from paceline.models.peft.options import FileOptions


class EveryParameter(Method):
    """Full fine-tuning: there is no adapter."""

    file_type = ""
    why_unmerged = "nothing was added"
    why_alone = "nothing was added"

    def attach(self, model: Decoder) -> None:
        pass

    def start(self, name: str, shape: tuple[int, ...], origin: Origin) -> Tensor:
        _no_adapter()

    def file_key(self, name: str, names: FileNames) -> str:
        _no_adapter()

    def file_config(self, names: FileNames, targets: list[str]) -> dict[str, Any]:
        _no_adapter()

    @classmethod
    def from_file(cls, options: FileOptions, names: FileNames) -> Self:
        _no_adapter()


def _no_adapter() -> NoReturn:
    raise UsageError("peft.method = none adds no parameters: there is no adapter")
