"""What an answer's text must be, and the tokens that it allows."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from paceline.decode.grammar_library import compiled, first_line, library_tokenizer
from paceline.decode.processors import DeadEndError, History
from paceline.models.tokenizer import Tokenizer

_NUM_KEPT = 32  # compiled grammars; the largest take a hundred megabytes


@dataclass(frozen=True, slots=True)
class Grammar:
    """What an answer's text must be.

    Attributes:
        kind: ``json``: JSON of a schema; ``regex``: what a regular expression matches as a whole,
            where a digit is one of ten and a letter one of ASCII's; ``json-object``: any JSON
            object.
        text: the schema as JSON or the regular expression; empty for any JSON object.
    """

    kind: Literal["json", "regex", "json-object"]
    text: str = ""


class Grammars:
    """The grammars of one model's answers, each compiled once; for several threads.

    What comes here has been compiled before where that could do no harm
    (`paceline.decode.grammar_check`).

    Args:
        tokenizer: of the model.
        vocab_size: logits of a row.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = max(vocab_size, tokenizer.vocab_size)
        self._compiled: OrderedDict[Grammar, Any] = OrderedDict()
        self._lock = threading.Lock()

    def compiled(self, grammar: Grammar) -> Any:
        """The library's matcher at the beginning of an answer, which is copied for each.

        Raises:
            RequestError: the grammar is none.
        """
        with self._lock:
            matcher = self._compiled.get(grammar)
        if matcher is None:  # outside the lock: the engine's thread takes it too
            matcher = compiled(grammar.kind, grammar.text, self._library_tokenizer)
        with self._lock:
            self._compiled[grammar] = matcher
            self._compiled.move_to_end(grammar)
            while len(self._compiled) > _NUM_KEPT:
                self._compiled.popitem(last=False)
        return matcher

    @cached_property
    def _library_tokenizer(self) -> Any:
        return library_tokenizer(
            self.tokenizer.backend.to_str(), self.vocab_size, list(self.tokenizer.eos_ids)
        )


class GrammarMask:
    """Drops the tokens that a grammar does not allow: a sampler processor.

    Args:
        grammars: that it is one of.
        grammar: of one answer.
    """

    def __init__(self, grammars: Grammars, grammar: Grammar) -> None:
        self._grammars, self._grammar = grammars, grammar
        self._matcher: Any = None
        self._num_consumed = 0

    def __call__(self, logits_V: Tensor, history: History) -> Tensor:
        if self._matcher is None:
            self._matcher = self._grammars.compiled(self._grammar).deep_copy()
        self._follow(history)
        allowed_V = self._allowed(len(logits_V))
        masked_V = logits_V.masked_fill(~allowed_V, -torch.inf)
        if masked_V.max() == -torch.inf:
            raise DeadEndError("the grammar allows no token here; the answer cannot go on")
        return masked_V

    def _follow(self, history: History) -> None:
        """Takes in the answer's tokens since the last call, or gives back those that are gone."""
        num_answer = len(history.tokens) - history.num_prompt
        if num_answer < self._num_consumed:
            self._matcher.rollback(self._num_consumed - num_answer)
        elif num_answer > self._num_consumed:
            start = history.num_prompt + self._num_consumed
            self._matcher.consume_tokens(list(history.tokens[start:]))
        self._num_consumed = num_answer
        self._require_well()

    def _allowed(self, num_logits: int) -> Tensor:
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._require_well()
        allowed_V = np.unpackbits(bits, count=num_logits, bitorder="little").view(np.bool_)
        return torch.from_numpy(allowed_V)

    def _require_well(self) -> None:
        if self._matcher.is_error():
            raise DeadEndError(f"the grammar cannot go on: {first_line(self._matcher.get_error())}")
