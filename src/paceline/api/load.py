"""``paceline.load`` and ``paceline.load_plan``: a model and a plan in one line each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from paceline.core.errors import UsageError
from paceline.kernels.device import choose_device, choose_dtype
from paceline.models.decoder import Decoder
from paceline.models.hub import resolve
from paceline.models.tokenizer import Tokenizer
from paceline.models.weights import build, fill
from paceline.plan.model_spec import ModelSpec
from paceline.plan.plan import Plan

_DTYPES = ("auto", "float64", "float32", "bfloat16")


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model with its weights.

    Attributes:
        model: a plain module in eval mode, ``forward(tokens_BT) -> logits_BTV``.
        tokenizer: text to token ids and back.
        spec: its sizes.
    """

    model: Decoder
    tokenizer: Tokenizer
    spec: ModelSpec


def load(model: str | Path, *, dtype: str = "auto", device: str = "auto") -> LoadedModel:
    """Loads a model.

    Args:
        model: a MODEL: a known name, a Hugging Face repo id, a folder, a ``.gguf`` file or
            ``random:FAMILY:SIZE``.
        dtype: of weights and activations; ``auto`` is bfloat16 where the device multiplies it
            natively, else float32.
        device: auto, cpu or cuda.

    Raises:
        UsageError: no such model, dtype or device.
        DataError: files that are damaged.
    """
    if dtype not in _DTYPES:
        raise UsageError(f"unknown dtype {dtype!r}", hint=f"one of {', '.join(_DTYPES)}")
    where = choose_device(device)
    source = resolve(str(model))
    decoder = build(source.spec, choose_dtype(dtype, where))
    fill(decoder, source.weights, where)
    return LoadedModel(decoder.eval(), source.tokenizer, source.spec)


def load_plan(path: str | Path) -> Plan:
    """Reads a plan file.

    Raises:
        UsageError: there is no such file, or it is not TOML.
        ConfigError: unknown keys and values of a wrong type, all of them.
    """
    return Plan.from_toml(path)
