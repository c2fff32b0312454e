"""Adapter folders in the format of the `peft` library: adapter_config.json and its tensors.

What is read computes what `peft` computes with it, or is refused; what is written, `peft` reads.
Bottleneck adapters, which `peft` does not have, are written in the same form.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from paceline.core.errors import DataError, UsageError, name_hint
from paceline.models.hf import read_json
from paceline.models.peft import PEFT
from paceline.models.peft.attach import method_of
from paceline.models.peft.base import Method
from paceline.models.peft.names import FileNames
from paceline.models.peft.options import FileOptions
from paceline.models.weights import build
from paceline.plan.model_spec import ModelSpec
from paceline.plan.plan import PeftConfig

CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"

_METHODS = {
    "LORA": "lora",
    "IA3": "ia3",
    "PREFIX_TUNING": "prefix",
    "PROMPT_TUNING": "prompt",
    "BOTTLENECK": "bottleneck",
}
"""What files call each method; LoRA's say beside it whether they are DoRA's."""

_DESCRIPTIVE = ("auto_mapping", "inference_mode", "peft_version", "revision")


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter that has been read, for a model that it fits.

    Attributes:
        path: its folder.
        config: the method and its sizes.
        tensors: the new parameters, under our names.
    """

    path: Path
    config: PeftConfig
    tensors: Mapping[str, Tensor]

    def read(self, name: str) -> Tensor:
        """One of the new parameters: an adapter is a `Weights`."""
        return self.tensors[name]


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter."""
    return (folder / CONFIG_FILE).is_file()


def base_model(folder: Path) -> str:
    """The MODEL that an adapter names as its base.

    Raises:
        UsageError: it names none.
        DataError: its config is broken.
    """
    name = named_base(folder)
    if not name:
        raise UsageError(
            f"{folder / CONFIG_FILE} names no base_model_name_or_path",
            hint=f"give the model, and --adapter {folder}",
        )
    return name


def named_base(folder: Path) -> str:
    """What an adapter calls its base model; empty if it names none."""
    name = _read_config(folder).get("base_model_name_or_path")
    return name if isinstance(name, str) else ""


def open_adapter(folder: Path, spec: ModelSpec) -> Adapter:
    """Reads an adapter for a model.

    Args:
        folder: the adapter's.
        spec: sizes of the model.

    Raises:
        UsageError: a missing file, an option that is not built, or another model's adapter.
        DataError: a file that is broken.
    """
    options = FileOptions(folder / CONFIG_FILE, _read_config(folder))
    method = _read_method(options, spec)
    options.ignore("base_model_name_or_path", *_DESCRIPTIVE)
    options.require("task_type", "CAUSAL_LM")
    options.refuse_rest()
    if (count := method.config.num_virtual_tokens) >= spec.max_positions:
        message = f"{count} virtual tokens leave nothing of a context of {spec.max_positions}"
        raise UsageError(f"{options.path}: {message}")
    stored = _read_tensors(folder)
    expected = _expected(method, spec)
    _require_fit(folder, stored, {key: shape for key, shape, _ in expected.values()})
    return Adapter(
        folder,
        method.config,
        {name: stored[key].view(shape) for name, (key, _, shape) in expected.items()},
    )


def write_adapter(
    folder: Path, spec: ModelSpec, config: PeftConfig, base: str, tensors: Mapping[str, Tensor]
) -> None:
    """Writes an adapter into a folder that is there.

    Args:
        folder: where to.
        spec: sizes of the model.
        config: the method and its sizes.
        base: the MODEL that was adapted.
        tensors: the new parameters, under our names.

    Raises:
        UsageError: an adapter that the format cannot hold.
    """
    method, names = method_of(config), FileNames(spec)
    fields = {
        "peft_type": method.file_type,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        **method.file_config(names, method.targets(build(spec))),
    }
    stored = {
        method.file_key(name, names): value.reshape(method.file_shape(name, tuple(value.shape)))
        for name, value in tensors.items()
    }
    save_file(
        {key: value.contiguous() for key, value in stored.items()},
        folder / TENSORS_FILE,
        metadata={"format": "pt"},
    )
    text = json.dumps(fields, indent=2, sort_keys=True)
    (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


def _read_config(folder: Path) -> dict[str, object]:
    path = folder / CONFIG_FILE
    if not path.is_file():
        hint = f"an adapter's folder holds {CONFIG_FILE} and {TENSORS_FILE}"
        raise UsageError(f"{path}: no such file", hint=hint)
    return read_json(path)


def _read_method(options: FileOptions, spec: ModelSpec) -> Method:
    kind = options.take_text("peft_type")
    if kind not in _METHODS:
        hint = name_hint(kind, _METHODS)
        raise UsageError(
            f"{options.path}: peft_type {kind!r} is not built in this version", hint=hint
        )
    is_dora = kind == "LORA" and options.take_switch("use_dora")
    name = "dora" if is_dora else _METHODS[kind]
    return PEFT.load(name).from_file(options, FileNames(spec))


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / TENSORS_FILE
    if not path.is_file():
        hint = "adapter_model.bin is not read: save the adapter with safe_serialization"
        raise UsageError(f"{path}: no such file", hint=hint)
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        hint = "the file is truncated or damaged: export or copy it again"
        raise DataError(f"{path} is not a whole safetensors file: {error}", hint=hint) from error


def _expected(
    method: Method, spec: ModelSpec
) -> dict[str, tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """Each new parameter's name in files, its shape there, and its own shape."""
    model, names = build(spec), FileNames(spec)
    own = {name for name, _ in model.named_parameters()}
    method.attach(model)
    found: dict[str, tuple[str, tuple[int, ...], tuple[int, ...]]] = {}
    for name, parameter in model.named_parameters():
        if name not in own:
            shape = tuple(parameter.shape)
            found[name] = (method.file_key(name, names), method.file_shape(name, shape), shape)
    return found


def _require_fit(
    folder: Path, stored: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]
) -> None:
    """Raises UsageError for the first tensor that does not fit the model."""
    path, hint = folder / TENSORS_FILE, "the adapter belongs to another model, or is not whole"
    for key, shape in expected.items():
        if key in stored and (found := tuple(stored[key].shape)) != shape:
            message = f"{path}: {key} has shape {found}, but the model wants {shape}"
            raise UsageError(message, hint=hint)
    for key, shape in expected.items():
        if key not in stored:
            message = f"{path} has no tensor {key}, of which the model wants shape {shape}"
            raise UsageError(message, hint=hint)
    for key, value in stored.items():
        if key not in expected:
            message = f"{path}: the model has no place for {key} of shape {tuple(value.shape)}"
            raise UsageError(message, hint=hint)
