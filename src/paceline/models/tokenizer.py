"""Text to token ids and back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from paceline.core.errors import DataError, RequestError, UsageError
from paceline.models.hf import read_json, read_text

_INCOMPLETE = "\ufffd"  # what the decoder shows for bytes that are not yet a character

BYTE_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Tokenizer:
    """A `tokenizers` pipeline, with what a model's files say about its use.

    Args:
        backend: the pipeline.
        eos_ids: tokens that end an answer.
        chat_template: Jinja source, or None for models that do not chat.
        special_tokens: names such as ``bos_token`` and their texts, for the template.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        eos_ids: Sequence[int],
        chat_template: str | None = None,
        special_tokens: dict[str, str] | None = None,
    ) -> None:
        self.backend = backend
        self.eos_ids = tuple(eos_ids)
        self.chat_template = chat_template
        self.special_tokens = special_tokens or {}

    @property
    def vocab_size(self) -> int:
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text.

        Raises:
            RequestError: the text holds half of a character, as bytes that are not UTF-8 leave it.
        """
        try:
            return self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError as error:
            raise RequestError("the text is not valid Unicode", param="prompt") from error

    @property
    def start_ids(self) -> list[int]:
        """The special tokens that `encode` puts before a text."""
        encoding = self.backend.encode("a", add_special_tokens=True)
        is_special = encoding.special_tokens_mask
        return encoding.ids[: is_special.index(0)] if 0 in is_special else []

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Many texts at once, on all cores, without special tokens."""
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def encode_with_starts(self, texts: Sequence[str]) -> list[tuple[list[int], list[int]]]:
        """As `encode_batch`, with the index of the character at which each token starts."""
        encodings = self._untrimmed.encode_batch(list(texts), add_special_tokens=False)
        return [(e.ids, [start for start, _ in e.offsets]) for e in encodings]

    @cached_property
    def _untrimmed(self) -> tokenizers.Tokenizer:
        """The pipeline without its post-processor, which may take spaces off a token's span."""
        backend = tokenizers.Tokenizer.from_str(self.backend.to_str())
        backend.post_processor = None  # type: ignore[assignment]
        return backend

    def decode(self, ids: Sequence[int]) -> str:
        return self.backend.decode(list(ids), skip_special_tokens=True)


class IncrementalDecoder:
    """Turns tokens into text as they come, holding back bytes that are not yet a character.

    The pieces joined, `finish` included, are `Tokenizer.decode` of all tokens.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._context_start = 0  # tokens before it no longer influence the text
        self._shown_end = 0  # tokens before it have been shown

    def push(self, token: int) -> str:
        """The text that this token completes, often empty."""
        self._ids.append(token)
        text = self._pending()
        if not text or text.endswith(_INCOMPLETE):
            return ""
        self._context_start, self._shown_end = self._shown_end, len(self._ids)
        return text

    def finish(self) -> str:
        """What was held back."""
        text = self._pending()
        self._shown_end = len(self._ids)
        return text

    def _pending(self) -> str:
        shown = self._tokenizer.decode(self._ids[self._context_start : self._shown_end])
        return self._tokenizer.decode(self._ids[self._context_start :])[len(shown) :]


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a model folder.

    Raises:
        UsageError: the folder has no tokenizer.json.
        DataError: a file that cannot be read.
    """
    path = folder / "tokenizer.json"
    if not path.exists():
        raise UsageError(f"{folder} has no tokenizer.json", hint="export or fetch the whole model")
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare exceptions
        raise DataError(f"{path} is not a tokenizer: {error}") from error
    backend.no_truncation()  # a file may keep what its last user has set
    backend.no_padding()
    config = _optional_json(folder / "tokenizer_config.json")
    special_tokens = {
        key: value if isinstance(value, str) else value["content"]
        for key, value in config.items()
        if key in ("bos_token", "eos_token", "pad_token", "unk_token") and value
    }
    template = config.get("chat_template")
    jinja_file = folder / "chat_template.jinja"
    if jinja_file.exists():
        template = read_text(jinja_file)
    return Tokenizer(
        backend,
        eos_ids=_eos_ids(folder, backend, special_tokens),
        chat_template=template,
        special_tokens=special_tokens,
    )


def byte_tokenizer() -> Tokenizer:
    """256 bytes and three special tokens: the tokenizer of random models."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate(alphabet)}
    return bpe_tokenizer(
        vocabulary,
        merges=[],
        pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        control_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        eos_tokens=["<|endoftext|>", "<|im_end|>"],
        chat_template=BYTE_TEMPLATE,
    )


def bpe_tokenizer(
    vocabulary: dict[str, int],
    *,
    merges: list[tuple[str, str]],
    pre_tokenizer: pre_tokenizers.PreTokenizer,
    control_tokens: Sequence[str],
    eos_tokens: Sequence[str],
    chat_template: str | None,
    special_tokens: dict[str, str] | None = None,
) -> Tokenizer:
    """A byte-level BPE tokenizer from its vocabulary and merges."""
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizer
    backend.decoder = decoders.ByteLevel()
    added = [AddedToken(token, special=True, normalized=False) for token in control_tokens]
    backend.add_special_tokens(added)
    ids = backend.get_vocab(with_added_tokens=True)
    return Tokenizer(
        backend,
        eos_ids=[ids[token] for token in eos_tokens],
        chat_template=chat_template,
        special_tokens=special_tokens or {"eos_token": eos_tokens[0]},
    )


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, str]:
    """The tokenizer as the files of a model folder, readable by `transformers` too."""
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **tokenizer.special_tokens,
    }
    if tokenizer.chat_template:
        config["chat_template"] = tokenizer.chat_template
    generation = {"eos_token_id": list(tokenizer.eos_ids)}
    return {
        "tokenizer.json": tokenizer.backend.to_str(pretty=True),
        "tokenizer_config.json": json.dumps(config, indent=2),
        "generation_config.json": json.dumps(generation, indent=2),
    }


def _eos_ids(
    folder: Path, backend: tokenizers.Tokenizer, special_tokens: dict[str, str]
) -> list[int]:
    """Ids that end an answer: generation_config.json knows best, then the tokenizer's own."""
    stated = _optional_json(folder / "generation_config.json").get("eos_token_id")
    if stated is None and "eos_token" in special_tokens:
        stated = backend.token_to_id(special_tokens["eos_token"])
    if stated is None:
        stated = _optional_json(folder / "config.json").get("eos_token_id")
    if stated is None:
        return []
    return list(stated) if isinstance(stated, list) else [stated]


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}
