"""The peer of the model benchmarks: `transformers`, on the very files that we read."""

from __future__ import annotations

from typing import Any

import torch

from paceline.core.errors import MissingExtraError, UnknownNameError
from paceline.models import hub

_NAME = "transformers"


def require_peer(against: str, model: str) -> str:
    """The peer's name and version, once it is sure that it can read the model.

    Raises:
        UnknownNameError: another peer, or a model that lies in no folder.
        MissingExtraError: the peer is not installed.
    """
    if against != _NAME:
        raise UnknownNameError("peer", against, [_NAME])
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError(_NAME, "dev") from error
    hub.locate(model)
    return f"{_NAME} {transformers.__version__}"


def load_peer(model: str, dtype: torch.dtype) -> Any:
    """The peer's model, its weights in `dtype`."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(hub.locate(model), dtype=dtype)
