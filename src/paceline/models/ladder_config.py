"""The config.json of a model whose residual is a ladder.

It holds the plain model's config one level down, under a type that no other library knows: whoever
would read it as the plain model finds neither its type nor its sizes. The plain type stands beside
that config and not in it, since `transformers` takes a part that has the type it looks for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MODEL_TYPE = "paceline_ladder"
_ARCHITECTURE = "PacelineLadderForCausalLM"
_LAYER, _PLAIN, _PLAIN_TYPE = "ladder_from", "plain", "plain_type"
_KEPT = ("dtype", "torch_dtype", "bos_token_id", "eos_token_id", "pad_token_id")
"""Keys that are read without the model's type."""


def as_ladder(config: Mapping[str, Any], first_layer: int) -> dict[str, Any]:
    """The config of a model that is the plain one's, but for its residual.

    Args:
        config: of the plain model.
        first_layer: that is a ladder, with all after it.
    """
    kept = {key: config[key] for key in _KEPT if key in config}
    marks = {"architectures": [_ARCHITECTURE], "model_type": MODEL_TYPE, _LAYER: first_layer}
    plain = {key: value for key, value in config.items() if key != "model_type"}
    return marks | kept | {_PLAIN_TYPE: config["model_type"], _PLAIN: plain}


def is_ladder(config: Mapping[str, Any]) -> bool:
    """Whether a config is one that `as_ladder` has made."""
    return config.get("model_type") == MODEL_TYPE


def plain_part(config: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
    """The plain model's config, and the first layer that is a ladder.

    Raises:
        KeyError: one of them is not there.
        TypeError: the first is no object.
    """
    return {**config[_PLAIN], "model_type": config[_PLAIN_TYPE]}, config[_LAYER]
