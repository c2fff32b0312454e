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
from tokenizers import pre_tokenizers
from torch import Tensor

from paceline.core.errors import DataError, UsageError
from paceline.models.families import family
from paceline.models.hf import WEIGHTS_FILE, write_weights
from paceline.models.tokenizer import Tokenizer, bpe_tokenizer, tokenizer_files
from paceline.models.weights import build
from paceline.plan.model_spec import ModelSpec

_STORED_NAMES = {
    "embedding": "token_embd",
    "attention_norm": "attn_norm",
    "attention.query": "attn_q",
    "attention.key": "attn_k",
    "attention.value": "attn_v",
    "attention.output": "attn_output",
    "ffn_norm": "ffn_norm",
    "ffn.gate": "ffn_gate",
    "ffn.up": "ffn_up",
    "ffn.down": "ffn_down",
    "norm": "output_norm",
    "head": "output",
}
_CONTROL_TOKEN = 3

_PRE_TOKENIZERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": lambda: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    ),
}


def convert(path: Path, folder: Path, advance: Callable[[int], None] = lambda _: None) -> None:
    """Writes a model folder from a GGUF file.

    Args:
        path: the file.
        folder: an empty folder.
        advance: told the parameters dequantised, for a progress bar.

    Raises:
        DataError: the file is not a whole GGUF file, or its tensors do not fit its fields.
        UsageError: an architecture, a tokenizer or a tensor that this version does not read.
    """
    reader = _open(path)
    spec = _spec(path, reader)
    tokenizer = _tokenizer(path, reader)
    config = family(spec.family).config_from_spec(spec) | _token_ids(reader) | {"dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    for name, text in tokenizer_files(tokenizer).items():
        (folder / name).write_text(text, encoding="utf-8")
    tensors = _tensors(path, reader, spec, advance)
    write_weights(folder / WEIGHTS_FILE, spec, tensors, torch.float32)


def num_parameters(path: Path) -> int:
    """How many parameters a file holds, for a progress bar."""
    return sum(int(np.prod(tensor.shape)) for tensor in _open(path).tensors)


def _open(path: Path) -> gguf.GGUFReader:
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    try:
        return gguf.GGUFReader(path)
    except Exception as error:  # the reader's own checks raise ValueError, numpy's and others
        hint = "the file is truncated or damaged: fetch it again"
        raise DataError(f"{path} is not a whole GGUF file: {error}", hint=hint) from error


def _spec(path: Path, reader: gguf.GGUFReader) -> ModelSpec:
    architecture = _field(path, reader, "general.architecture")
    if architecture != "llama":
        raise UsageError(f"{path}: architecture {architecture!r} is not built in this version")
    if any(name.startswith(f"{architecture}.rope.scaling") for name in reader.fields):
        raise UsageError(f"{path}: rope scaling in GGUF is not built in this version")

    def size(name: str) -> Any:
        return _field(path, reader, f"{architecture}.{name}")

    tensors = {tensor.name: tensor for tensor in reader.tensors}
    _require_tensors(path, {"token_embd.weight", "blk.0.attn_q.weight"} - tensors.keys())
    num_heads = size("attention.head_count")
    return ModelSpec(
        family="llama",
        vocab_size=int(tensors["token_embd.weight"].shape[1]),
        d_model=size("embedding_length"),
        num_layers=size("block_count"),
        num_heads=num_heads,
        num_kv_heads=size("attention.head_count_kv"),
        head_dim=int(tensors["blk.0.attn_q.weight"].shape[1]) // num_heads,
        d_ffn=size("feed_forward_length"),
        max_positions=size("context_length"),
        rope_theta=size("rope.freq_base"),
        norm_eps=float(str(np.float32(size("attention.layer_norm_rms_epsilon")))),
        tied_embeddings="output.weight" not in tensors,
        attention_bias="blk.0.attn_q.bias" in tensors,
        ffn_bias="blk.0.ffn_up.bias" in tensors,
    )


def _tokenizer(path: Path, reader: gguf.GGUFReader) -> Tokenizer:
    kind = _field(path, reader, "tokenizer.ggml.model")
    pre = _field(path, reader, "tokenizer.ggml.pre") if kind == "gpt2" else ""
    if kind != "gpt2" or pre not in _PRE_TOKENIZERS:
        hint = f"gpt2 with {', '.join(_PRE_TOKENIZERS)}"
        raise UsageError(f"{path}: tokenizer {kind} {pre} is not built in this version", hint=hint)
    tokens = _field(path, reader, "tokenizer.ggml.tokens")
    types = _field(path, reader, "tokenizer.ggml.token_type")
    merges = _field(path, reader, "tokenizer.ggml.merges")
    template = reader.get_field("tokenizer.chat_template")
    ids = _token_ids(reader)
    names = {"bos_token_id": "bos_token", "eos_token_id": "eos_token", "pad_token_id": "pad_token"}
    special_tokens = {names[key]: tokens[ids[key]] for key in names if key in ids}
    return bpe_tokenizer(
        {token: index for index, token in enumerate(tokens)},
        merges=[tuple(merge.split(" ")) for merge in merges],
        pre_tokenizer=_PRE_TOKENIZERS[pre](),
        control_tokens=[t for t, kind in zip(tokens, types, strict=True) if kind == _CONTROL_TOKEN],
        eos_tokens=[special_tokens["eos_token"]],
        chat_template=template.contents() if template else None,
        special_tokens=special_tokens,
    )


def _token_ids(reader: gguf.GGUFReader) -> dict[str, int]:
    ids: dict[str, int] = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("padding", "pad")):
        if (field := reader.get_field(f"tokenizer.ggml.{name}_token_id")) is not None:
            ids[f"{key}_token_id"] = int(field.contents())
    return ids


def _tensors(
    path: Path, reader: gguf.GGUFReader, spec: ModelSpec, advance: Callable[[int], None]
) -> Iterator[tuple[str, Tensor]]:
    heads = {"query": spec.num_heads, "key": spec.num_kv_heads}
    shapes = {name: tuple(p.shape) for name, p in build(spec).named_parameters()}
    names = {_stored_name(name): name for name in shapes}
    _require_tensors(path, names.keys() - {tensor.name for tensor in reader.tensors})
    for tensor in reader.tensors:
        if tensor.name not in names:
            raise UsageError(f"{path}: tensor {tensor.name} is not built in this version")
        name = names[tensor.name]
        values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if values.shape != shapes[name]:
            rule = f"its fields imply {shapes[name]}"
            raise DataError(f"{path}: tensor {tensor.name} has shape {values.shape}, but {rule}")
        if (part := name.split(".")[-2]) in heads:
            values = _split_halves(values, heads[part])
        advance(values.size)
        yield name, torch.from_numpy(np.ascontiguousarray(values))


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


def _field(path: Path, reader: gguf.GGUFReader, name: str) -> Any:
    field = reader.get_field(name)
    if field is None:
        raise DataError(f"{path}: lacks the field {name}")
    return field.contents()
