"""The tokenizer that a GGUF file carries, as a `tokenizers` pipeline."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from paceline.core.errors import DataError, UsageError
from paceline.models.tokenizer import Tokenizer

_CONTROL, _USER_DEFINED = 3, 4  # types of tokens that are taken as they are
_QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_BYTE_LEVEL: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": lambda: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    ),
    "qwen2": lambda: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
}


def read_gguf_tokenizer(path: Path, reader: gguf.GGUFReader) -> Tokenizer:
    """The tokenizer, its chat template and its special tokens.

    Raises:
        UsageError: a kind of tokenizer that is not built.
        DataError: fields that are missing.
    """
    kind = read_field(path, reader, "tokenizer.ggml.model")
    tokens: list[str] = read_field(path, reader, "tokenizer.ggml.tokens")
    if kind == "gpt2":
        backend = _byte_level(path, reader, tokens)
    elif kind == "llama":
        backend = _sentence_piece(path, reader, tokens)
    else:
        hint = "gpt2 and llama can be read"
        raise UsageError(f"{path}: tokenizer {kind} is not built in this version", hint=hint)
    types = read_field(path, reader, "tokenizer.ggml.token_type")
    for token, token_type in zip(tokens, types, strict=True):
        if token_type in (_CONTROL, _USER_DEFINED):
            is_control = token_type == _CONTROL
            backend.add_tokens([AddedToken(token, special=is_control, normalized=False)])
    ids = token_ids(reader)
    names = {"bos_token_id": "bos_token", "eos_token_id": "eos_token", "pad_token_id": "pad_token"}
    special_tokens = {names[key]: tokens[ids[key]] for key in names if key in ids}
    _add_bos(reader, backend, special_tokens, ids)
    template = reader.get_field("tokenizer.chat_template")
    return Tokenizer(
        backend,
        eos_ids=[ids["eos_token_id"]] if "eos_token_id" in ids else [],
        chat_template=template.contents() if template else None,
        special_tokens=special_tokens,
    )


def token_ids(reader: gguf.GGUFReader) -> dict[str, int]:
    """Ids of the special tokens, under the keys of a config.json."""
    ids: dict[str, int] = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("padding", "pad")):
        if (field := reader.get_field(f"tokenizer.ggml.{name}_token_id")) is not None:
            ids[f"{key}_token_id"] = int(field.contents())
    return ids


def read_field(path: Path, reader: gguf.GGUFReader, name: str) -> Any:
    """The value of a field that must be there."""
    field = reader.get_field(name)
    if field is None:
        raise DataError(f"{path}: lacks the field {name}")
    return field.contents()


def _byte_level(path: Path, reader: gguf.GGUFReader, tokens: list[str]) -> tokenizers.Tokenizer:
    pre = read_field(path, reader, "tokenizer.ggml.pre")
    if pre not in _BYTE_LEVEL:
        hint = ", ".join(_BYTE_LEVEL)
        raise UsageError(f"{path}: tokenizer gpt2 {pre} is not built in this version", hint=hint)
    merges = [tuple(m.split(" ")) for m in read_field(path, reader, "tokenizer.ggml.merges")]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = _BYTE_LEVEL[pre]()
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentence_piece(path: Path, reader: gguf.GGUFReader, tokens: list[str]) -> tokenizers.Tokenizer:
    """SentencePiece's BPE: a merge is worth the score of the piece that it makes."""
    scores = read_field(path, reader, "tokenizer.ggml.scores")
    prefix = reader.get_field("tokenizer.ggml.add_space_prefix")
    if prefix is None or prefix.contents():
        raise UsageError(f"{path}: a tokenizer with a space in front is not built in this version")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    unknown = read_field(path, reader, "tokenizer.ggml.unknown_token_id")
    model = models.BPE(
        vocab=vocabulary,
        merges=_merges(vocabulary, scores),
        unk_token=tokens[unknown],
        fuse_unk=True,
        byte_fallback=True,
    )
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return backend


def _merges(vocabulary: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """All ways to make a piece of two others, best piece first."""
    found: list[tuple[float, int, int, str, str]] = []
    for piece, index in vocabulary.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocabulary and right in vocabulary:
                ids = vocabulary[left], vocabulary[right]
                found.append((-scores[index], *ids, left, right))
    return [(left, right) for *_, left, right in sorted(found)]


def _add_bos(
    reader: gguf.GGUFReader,
    backend: tokenizers.Tokenizer,
    special_tokens: dict[str, str],
    ids: dict[str, int],
) -> None:
    """Puts the first token before every text, if the file says so."""
    wanted = reader.get_field("tokenizer.ggml.add_bos_token")
    if wanted is None or not wanted.contents() or "bos_token" not in special_tokens:
        return
    bos = special_tokens["bos_token"]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, ids["bos_token_id"])]
    )
