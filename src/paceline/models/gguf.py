"""GGUF files turned into model folders.

The weights are dequantised to float32, so that what the file says is kept exactly; the row order
that llama.cpp gives to query and key matrices is undone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from paceline.core.errors import DataError, UsageError
from paceline.models.families import family, spec_from_config
from paceline.models.gguf_tokenizer import read_field, read_gguf_tokenizer, token_ids
from paceline.models.hf import WEIGHTS_FILE, write_weights
from paceline.models.tokenizer import tokenizer_files
from paceline.models.weights import build
from paceline.plan.model_spec import ModelSpec

_STORED_NAMES = {
    "embedding": "token_embd",
    "attention_norm": "attn_norm",
    "attention.query": "attn_q",
    "attention.key": "attn_k",
    "attention.value": "attn_v",
    "attention.output": "attn_output",
    "attention.query_norm": "attn_q_norm",
    "attention.key_norm": "attn_k_norm",
    "attention_post_norm": "post_attention_norm",
    "ffn_norm": "ffn_norm",
    "ffn.gate": "ffn_gate",
    "ffn.up": "ffn_up",
    "ffn.down": "ffn_down",
    "ffn_post_norm": "post_ffw_norm",
    "norm": "output_norm",
    "head": "output",
}
_MODEL_TYPES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma3": "gemma3_text",
}
"""What a file calls a family, and what a config.json calls it."""

_PAIRED_ROWS = ("llama",)
"""Families whose rotated rows llama.cpp keeps as pairs, not as halves."""


def convert(
    path: Path,
    reader: gguf.GGUFReader,
    folder: Path,
    advance: Callable[[int], None] = lambda _: None,
) -> None:
    """Writes a model folder from a GGUF file.

    Args:
        path: the file.
        reader: of the file; see `open_file`.
        folder: an empty folder.
        advance: told the parameters dequantised, for a progress bar.

    Raises:
        DataError: fields or tensors are missing, or do not fit each other.
        UsageError: an architecture, a tokenizer or a tensor that this version does not read.
    """
    spec = spec_from_config(_config(path, reader), source=str(path))
    tokenizer = read_gguf_tokenizer(path, reader)
    config = family(spec.family).config_from_spec(spec) | token_ids(reader) | {"dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    for name, text in tokenizer_files(tokenizer).items():
        (folder / name).write_text(text, encoding="utf-8")
    tensors = _tensors(path, reader, spec, advance)
    write_weights(folder / WEIGHTS_FILE, spec, tensors, torch.float32)


def num_parameters(reader: gguf.GGUFReader) -> int:
    """How many parameters a file holds, for a progress bar."""
    return sum(int(np.prod(tensor.shape)) for tensor in reader.tensors)


def open_file(path: Path) -> gguf.GGUFReader:
    """Maps a file into memory.

    Raises:
        UsageError: there is no such file.
        DataError: it is not a whole GGUF file.
    """
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    try:
        return gguf.GGUFReader(path)
    except Exception as error:  # the reader's own checks raise ValueError, numpy's and others
        hint = "the file is truncated, damaged or of a newer format: fetch it again"
        raise DataError(f"{path} is not a whole GGUF file: {error}", hint=hint) from error


def _config(path: Path, reader: gguf.GGUFReader) -> dict[str, Any]:
    """A file's fields under the keys of a config.json.

    Raises:
        UsageError: an architecture that this version does not read.
        DataError: fields or tensors that are missing.
    """
    architecture = read_field(path, reader, "general.architecture")
    if architecture not in _MODEL_TYPES:
        hint = f"{', '.join(_MODEL_TYPES)} can be read"
        message = f"{path}: architecture {architecture!r} is not built in this version"
        raise UsageError(message, hint=hint)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    _require_tensors(path, {"token_embd.weight", "blk.0.attn_q.weight"} - tensors.keys())

    def size(name: str) -> Any:
        return read_field(path, reader, f"{architecture}.{name}")

    num_heads = size("attention.head_count")
    head_dim = int(tensors["blk.0.attn_q.weight"].shape[1]) // num_heads
    config = {
        "model_type": _MODEL_TYPES[architecture],
        "vocab_size": int(tensors["token_embd.weight"].shape[1]),
        "hidden_size": size("embedding_length"),
        "num_hidden_layers": size("block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": size("attention.head_count_kv"),
        "head_dim": head_dim,
        "intermediate_size": size("feed_forward_length"),
        "max_position_embeddings": size("context_length"),
        "rope_theta": size("rope.freq_base"),
        "rms_norm_eps": float(str(np.float32(size("attention.layer_norm_rms_epsilon")))),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
        "rope_scaling": _scaling(path, reader, architecture),
    }
    if architecture == "gemma3":
        config |= {
            "sliding_window": size("attention.sliding_window"),
            "query_pre_attn_scalar": head_dim,  # of all sizes but 27B
        }
    return config


def _scaling(path: Path, reader: gguf.GGUFReader, architecture: str) -> dict[str, Any] | None:
    prefix = f"{architecture}.rope.scaling"
    if not any(name.startswith(prefix) for name in reader.fields):
        return None
    kind = reader.get_field(f"{prefix}.type")
    if kind is None or kind.contents() != "linear":
        named = kind.contents() if kind else "without a type"
        raise UsageError(f"{path}: rope scaling {named} in GGUF is not built in this version")
    return {"rope_type": "linear", "factor": read_field(path, reader, f"{prefix}.factor")}


def _tensors(
    path: Path, reader: gguf.GGUFReader, spec: ModelSpec, advance: Callable[[int], None]
) -> Iterator[tuple[str, Tensor]]:
    heads = {"query": spec.num_heads, "key": spec.num_kv_heads}
    heads = heads if spec.family in _PAIRED_ROWS else {}
    shapes = {name: tuple(p.shape) for name, p in build(spec).named_parameters()}
    names = {_stored_name(name): name for name in shapes}
    _require_tensors(path, names.keys() - {tensor.name for tensor in reader.tensors})
    for tensor in reader.tensors:
        if tensor.name not in names:
            raise UsageError(f"{path}: tensor {tensor.name} is not built in this version")
        name = names[tensor.name]
        values = _dequantized(path, tensor)
        if values.shape != shapes[name]:
            rule = f"its fields imply {shapes[name]}"
            raise DataError(f"{path}: tensor {tensor.name} has shape {values.shape}, but {rule}")
        if (part := name.split(".")[-2]) in heads:
            values = _split_halves(values, heads[part])
        if "norm" in part:  # llama.cpp stores the weight with its offset
            values = values - np.float32(spec.norm_offset)
        advance(values.size)
        yield name, torch.from_numpy(np.ascontiguousarray(values))


def _dequantized(path: Path, tensor: gguf.ReaderTensor) -> NDArray[np.float32]:
    try:
        return gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
    except NotImplementedError as error:
        kind = tensor.tensor_type.name
        message = f"{path}: tensor {tensor.name} is in {kind}, which is not built in this version"
        hint = "a file in Q8_0, Q6_K, Q5_K, Q4_K, Q4_1, Q4_0, BF16, F16 or F32"
        raise UsageError(message, hint=hint) from error


def _stored_name(name: str) -> str:
    """llama.cpp's name for one of our parameters."""
    part, kind = name.rsplit(".", 1)
    if not part.startswith("blocks."):
        return f"{_STORED_NAMES[part]}.{kind}"
    _, layer, part = part.split(".", 2)
    return f"blk.{layer}.{_STORED_NAMES[part]}.{kind}"


def _require_tensors(path: Path, missing: set[str]) -> None:
    if missing:
        raise DataError(f"{path}: lacks the tensor {min(missing)}")


def _split_halves(values: NDArray[np.float32], num_heads: int) -> NDArray[np.float32]:
    """Rows from llama.cpp's order (pairs side by side) to the published one (two halves)."""
    rows = values.reshape(num_heads, -1, 2, *values.shape[1:])
    return rows.swapaxes(1, 2).reshape(values.shape)
