"""A file of prompts to a file of answers, which goes on where it was ended.

Answers stand in the order of the prompts, so that whole lines of the output say how far the work
has come. A line is written at once; one that a kill has torn is dropped when the work goes on.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from paceline.core.errors import DataError, RequestError, UsageError
from paceline.serve.api.shapes import usage
from paceline.serve.engine import Answer, Engine, join
from paceline.serve.options import Options
from paceline.serve.prompts_file import Line, read_lines
from paceline.serve.request import Delta

WINDOW = 1024
"""Lines that are begun and not yet written, at most: memory does not grow with the file."""


def answer_file(
    engine: Engine,
    input_path: Path,
    output_path: Path,
    options: Options,
    *,
    resumes: bool,
    on_progress: Callable[[Progress], None],
) -> Progress:
    """Answers every line of a file.

    Args:
        engine: that answers, on this thread.
        input_path: JSON objects, one a line.
        output_path: where answers go, one a line, in the same order.
        options: where a line says nothing.
        resumes: whether the output may hold answers, which are kept.
        on_progress: called with how far the work has come.

    Raises:
        UsageError: the output exists and the work is not to go on, or another process writes it.
        DataError: a line that cannot be used; none has been begun then.
    """
    num_lines = sum(1 for _ in read_lines(input_path, options))  # all are sound, before the first
    with _opened(output_path, resumes) as file:
        progress = Progress(num_lines, num_done=_num_whole(file, output_path))
        if progress.num_done > num_lines:
            raise UsageError(f"{output_path} has more lines than {input_path}")
        lines = (x for x in read_lines(input_path, options) if x.number > progress.num_done)
        on_progress(progress)
        for line in _answers(engine, lines):
            file.write(json.dumps(line.written()).encode() + b"\n")
            file.flush()
            progress = progress.after(line)
            on_progress(progress)
    return progress


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the work has come.

    Attributes:
        num_lines: of the input.
        num_done: that are written, those found included.
        num_tokens: sampled in this run.
        num_refused: lines of this run that could not be answered.
    """

    num_lines: int
    num_done: int = 0
    num_tokens: int = 0
    num_refused: int = 0

    def after(self, line: _Begun) -> Progress:
        return Progress(
            self.num_lines,
            self.num_done + 1,
            self.num_tokens + line.num_tokens,
            self.num_refused + line.is_refused,
        )


@dataclass(slots=True)
class _Begun:
    """A line that is being answered."""

    line: Line
    num_prompt: int = 0
    deltas: list[Delta] = field(default_factory=list)

    @property
    def is_ended(self) -> bool:
        return bool(self.deltas) and self.deltas[-1].finish_reason is not None

    @property
    def is_refused(self) -> bool:
        return bool(self.deltas[-1].error)

    @property
    def num_tokens(self) -> int:
        return sum(len(delta.token_ids) for delta in self.deltas)

    def written(self) -> dict[str, Any]:
        """The line of the output."""
        names = {"id": self.line.asked["id"]} if "id" in self.line.asked else {}
        found = answer_as_json(join(self.deltas), self.num_prompt)
        return {"number": self.line.number, **names, **found}


def answer_as_json(answer: Answer, num_prompt: int) -> dict[str, Any]:
    """An answer as ``generate --json`` prints it.

    Args:
        answer: that is printed.
        num_prompt: tokens of its prompt.
    """
    told: dict[str, Any] = {
        "text": answer.text,
        "token_ids": list(answer.token_ids),
        "finish_reason": answer.finish_reason,
        "usage": usage(num_prompt, len(answer.token_ids)),
    }
    for name in ("logprobs", "prompt_logprobs"):
        if tokens := getattr(answer, name):
            told[name] = [
                {"token_id": one.token, "logprob": one.logprob, "top": [list(x) for x in one.top]}
                for one in tokens
            ]
    return told | ({"error": answer.error} if answer.error else {})


def _answers(engine: Engine, lines: Iterator[Line]) -> Iterator[_Begun]:
    """Lines as they are answered, in their order."""
    window: deque[_Begun] = deque()
    is_more = True
    while window or is_more:
        while is_more and len(window) < WINDOW:
            line = next(lines, None)
            is_more = line is not None
            if line is not None:
                window.append(_begin(engine, line))
        engine.step()
        while window and window[0].is_ended:
            yield window.popleft()


def _begin(engine: Engine, line: Line) -> _Begun:
    """A line that cannot be answered ends at once, and harms no other."""
    begun = _Begun(line)
    try:
        ids = line.prompt_ids(engine.tokenizer)
        begun.num_prompt = len(ids)
        engine.submit(line.options.request(ids), begun.deltas.append)
    except RequestError as error:
        begun.deltas.append(Delta("", (), "error", str(error)))
    return begun


@contextmanager
def _opened(path: Path, resumes: bool) -> Iterator[IO[bytes]]:
    """The output, this process's alone."""
    try:
        number = os.open(path, os.O_RDWR | os.O_CREAT | (0 if resumes else os.O_EXCL), 0o666)
    except FileExistsError as error:
        hint = "--resume goes on with it"
        raise UsageError(f"{path} exists already", hint=hint) from error
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}") from error
    with os.fdopen(number, "r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(f"another process is writing {path}") from error
        yield file


def _num_whole(file: IO[bytes], path: Path) -> int:
    """Answers in the output; a torn last line is cut off, and writing goes on there.

    Raises:
        DataError: the output is not what this command writes.
    """
    whole_bytes = num_lines = 0
    for text in file:
        if not text.endswith(b"\n"):
            break
        num_lines += 1
        if _number(text) != num_lines:
            raise DataError(f"{path}:{num_lines}: not the answer to line {num_lines}")
        whole_bytes += len(text)
    file.seek(whole_bytes)
    file.truncate()
    return num_lines


def _number(text: bytes) -> int | None:
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line.get("number") if isinstance(line, dict) else None
