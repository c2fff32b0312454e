"""The process that compiles what strangers send, before the engine does.

It reads lines of JSON and answers each with one. The first is
``{"tokenizer", "vocab_size", "eos_ids", "memory_bytes"}``, the others ``{"kind", "text"}``. An
answer is ``{"error"}``, null where the grammar can be used. Whoever started it ends it where it
takes too long.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from typing import Any

from paceline.core.errors import RequestError
from paceline.decode.grammar_library import compiled, first_line, library_tokenizer


def main() -> None:
    """Answers until its input ends."""
    first = json.loads(sys.stdin.readline())
    tokenizer = library_tokenizer(first["tokenizer"], first["vocab_size"], first["eos_ids"])
    _bound_memory(first["memory_bytes"])
    _answer(None)
    for line in sys.stdin:
        asked = json.loads(line)
        _answer(_error(asked["kind"], asked["text"], tokenizer))


def _error(kind: str, text: str, tokenizer: Any) -> str | None:
    """Why a grammar cannot be used; its first mask is part of the trial."""
    try:
        matcher = compiled(kind, text, tokenizer)
    except RequestError as error:
        return error.message
    except MemoryError:
        return "the grammar needs too much memory"
    matcher.compute_bitmask()
    return first_line(matcher.get_error()) if matcher.is_error() else None


def _answer(error: str | None) -> None:
    sys.stdout.write(json.dumps({"error": error}) + "\n")
    sys.stdout.flush()


def _bound_memory(more_bytes: int) -> None:
    """Beyond what it has now; an allocation that would exceed it ends the process."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most_bytes = pages * resource.getpagesize() + more_bytes
    resource.setrlimit(resource.RLIMIT_AS, (most_bytes, most_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


if __name__ == "__main__":
    main()
