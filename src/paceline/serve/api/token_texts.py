"""What each token of a vocabulary is in bytes and in text."""

from __future__ import annotations

import re
from functools import cache

from tokenizers import pre_tokenizers

from paceline.models.tokenizer import Tokenizer

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class TokenTexts:
    """Tokens as log-probabilities name them: one by one, whole characters or not.

    Args:
        tokenizer: of the model.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._backend = tokenizer.backend
        self._added = dict(self._backend.get_added_tokens_decoder())
        self._is_byte_level = "ByteLevel" in repr(self._backend.decoder)
        self._known: dict[int, bytes] = {}

    def bytes_of(self, token: int) -> bytes:
        """A token's part of the text; of a special token, its name."""
        found = self._known.get(token)
        if found is None:
            found = self._known[token] = self._look_up(token)
        return found

    def text_of(self, token: int) -> str:
        """The same as text; bytes that are no characters are spelled out."""
        raw = self.bytes_of(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def is_shown(self, token: int) -> bool:
        """Whether a token is part of the text that clients see."""
        added = self._added.get(token)
        return added is None or not added.special

    def _look_up(self, token: int) -> bytes:
        if (added := self._added.get(token)) is not None:
            return added.content.encode()
        piece = self._backend.id_to_token(token)
        if piece is None:  # a model may have more rows than its tokenizer has tokens
            return b""
        if self._is_byte_level:
            return bytes(_byte_of_symbol()[symbol] for symbol in piece)
        if (match := _BYTE.fullmatch(piece)) is not None:
            return bytes([int(match[1], 16)])
        return piece.replace("\u2581", " ").encode()


@cache
def _byte_of_symbol() -> dict[str, int]:
    """The symbol that stands for each byte in byte-level vocabularies.

    A printable byte stands for itself; the others follow from 256 on, in their order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    symbols = {chr(byte): byte for byte in printable}
    symbols |= {chr(256 + index): byte for index, byte in enumerate(others)}
    assert set(symbols) == set(pre_tokenizers.ByteLevel.alphabet())
    return symbols
