"""Whether a grammar can be used, found out where it can do no harm.

What is compiled cannot be carried from one process to another: the library has no form for it. So
a process of little memory compiles it first, and is killed where that takes too long; what it has
compiled within its bounds is compiled here again, which then takes the same time and memory.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import threading
import time
import weakref
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from paceline.core.errors import PacelineError, RequestError
from paceline.decode.grammar import Grammar, Grammars

_NUM_KEPT = 256  # outcomes


@dataclass(frozen=True, kw_only=True, slots=True)
class GrammarBounds:
    """What a grammar may take.

    Attributes:
        max_chars: of its text.
        compile_s: to compile it.
        memory_bytes: to compile it, beside what the process has from the start.
        start_s: for the process to start, with the model's tokenizer.
    """

    max_chars: int = 1 << 16
    compile_s: float = 3.0
    memory_bytes: int = 128 << 20
    start_s: float = 120.0


class GrammarCheck:
    """Compiles grammars on trial, one after another; for several threads.

    Args:
        grammars: of the model, where those that pass are compiled too.
        bounds: of each.
    """

    def __init__(self, grammars: Grammars, bounds: GrammarBounds | None = None) -> None:
        self._grammars, self._bounds = grammars, bounds or GrammarBounds()
        self._outcomes: OrderedDict[Grammar, str] = OrderedDict()
        self._worker: _Worker | None = None
        self._lock, self._trial = threading.Lock(), threading.Lock()

    def require(self, grammar: Grammar) -> None:
        """Returns once the grammar can be used; at once where it has been asked for before.

        Raises:
            RequestError: it cannot be.
        """
        if len(grammar.text) > self._bounds.max_chars:
            raise RequestError(
                f"a grammar of {len(grammar.text)} characters exceeds {self._bounds.max_chars}",
                param="grammar",
            )
        if not self._grammars.tokenizer.eos_ids:
            raise RequestError("the model has no token that ends an answer", param="grammar")
        error = self._known(grammar)
        if error is None:
            with self._trial:  # others wait here, those that are known do not
                error = self._known(grammar)
                if error is None:
                    error = self._tried(grammar)
                    self._remember(grammar, error)
        if error:
            raise RequestError(error, param="grammar")
        self._grammars.compiled(grammar)

    def _known(self, grammar: Grammar) -> str | None:
        """Why the grammar cannot be used, empty if it can be, None if it is not known."""
        with self._lock:
            return self._outcomes.get(grammar)

    def _remember(self, grammar: Grammar, error: str) -> None:
        with self._lock:
            self._outcomes[grammar] = error
            while len(self._outcomes) > _NUM_KEPT:
                self._outcomes.popitem(last=False)

    def _tried(self, grammar: Grammar) -> str:
        """Why the grammar cannot be used; empty if it can be.

        A process that ends may have been ended by another's hand, so it is tried twice.
        """
        line, why = {"kind": grammar.kind, "text": grammar.text}, ""
        for _ in range(2):
            if self._worker is None or not self._worker.is_alive:
                self._worker = None  # the last one's end
                self._worker = _Worker(self._grammars, self._bounds)
            try:
                return self._worker.ask(line, self._bounds.compile_s) or ""
            except TimeoutError:
                return f"the grammar takes more than {self._bounds.compile_s} s to compile"
            except EOFError as error:
                why = str(error)
        return f"the grammar takes more memory than it may, or else: {why}"


class _Worker:
    """A process that compiles; it ends with this object.

    Raises:
        PacelineError: it does not start.
    """

    def __init__(self, grammars: Grammars, bounds: GrammarBounds) -> None:
        command = [sys.executable, "-m", "paceline.decode.grammar_worker"]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, bufsize=0
        )
        self._finalizer = weakref.finalize(self, _end, self._process)
        first = {
            "tokenizer": grammars.tokenizer.backend.to_str(),
            "vocab_size": grammars.vocab_size,
            "eos_ids": list(grammars.tokenizer.eos_ids),
            "memory_bytes": bounds.memory_bytes,
        }
        try:
            error = self.ask(first, bounds.start_s)
        except (TimeoutError, EOFError) as failure:
            raise PacelineError(f"the process that compiles grammars: {failure}") from failure
        assert error is None, error

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, line: dict[str, Any], limit_s: float) -> str | None:
        """The error that the process answers a line with.

        Raises:
            TimeoutError: it took too long, and was killed.
            EOFError: it has ended.
        """
        assert self._process.stdin is not None
        try:
            _write(self._process.stdin.fileno(), json.dumps(line).encode() + b"\n")
            return json.loads(self._read_line(limit_s))["error"]
        except BrokenPipeError:
            pass
        except TimeoutError:
            self._finalizer()
            raise
        except EOFError:
            pass
        self._finalizer()
        raise EOFError(f"its process ended with {self._process.returncode}")

    def _read_line(self, limit_s: float) -> bytes:
        assert self._process.stdout is not None
        file, end_s, line = self._process.stdout.fileno(), time.monotonic() + limit_s, b""
        while not line.endswith(b"\n"):
            left_s = end_s - time.monotonic()
            if left_s <= 0 or not select.select([file], [], [], left_s)[0]:
                raise TimeoutError(f"no answer after {limit_s} s")
            part = os.read(file, 1 << 16)
            if not part:
                raise EOFError
            line += part
        return line


def _write(file: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kills a process, ended or not, and closes its pipes."""
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        pipe.close()
