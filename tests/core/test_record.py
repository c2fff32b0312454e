from __future__ import annotations

import signal
import subprocess
import sys
from dataclasses import dataclass
from typing import ClassVar

import pytest

from paceline.core.errors import DataError, UsageError
from paceline.core.record import Record, RecordWriter, read_records


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRecord(Record):
    kind: ClassVar[str] = "step"

    step: int
    loss: float
    note: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class EndRecord(Record):
    kind: ClassVar[str] = "end"

    steps: tuple[int, ...] = ()


FIRST = StepRecord(step=0, loss=1 / 3, note="line\nbreak, \u2028, \u00e9")
LAST = EndRecord(steps=(0, 1))


def write(path, *records):
    writer = RecordWriter(path)
    for record in records:
        writer.write(record)
    writer.close()


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "run" / "records" / "rank-0.jsonl"
    writer = RecordWriter(path)
    writer.write(FIRST)
    assert len(list(read_records(path))) == 1  # before the writer is closed
    writer.close()
    write(path, LAST)
    first = {"kind": "step", "step": 0, "loss": 1 / 3, "note": FIRST.note}
    last = {"kind": "end", "steps": [0, 1]}
    assert list(read_records(path)) == [first, last]
    assert list(read_records(path, "step")) == [first]
    assert list(read_records(path, "none")) == []
    assert path.read_bytes().count(b"\n") == 2


def test_a_line_broken_anywhere_is_dropped_by_readers_and_cut_by_writers(tmp_path):
    path = tmp_path / "records.jsonl"
    write(path, FIRST)
    whole = path.read_bytes()
    for start in (b"", whole, whole + whole):
        for length in range(len(whole)):
            path.write_bytes(start + whole[:length])
            assert len(list(read_records(path))) == start.count(b"\n")
            write(path, LAST)
            kinds = [record["kind"] for record in read_records(path)]
            assert kinds == ["step"] * start.count(b"\n") + ["end"]


@pytest.mark.parametrize("line", [b"{", b"", b"[1]", b"3", b"null", b'"text"', b"\xff"])
@pytest.mark.parametrize("kind", [None, "step"])
def test_a_broken_line_before_the_last_names_its_place(tmp_path, line, kind):
    path = tmp_path / "records.jsonl"
    write(path, FIRST)
    path.write_bytes(path.read_bytes() + line + b"\n" + path.read_bytes())
    with pytest.raises(DataError, match=r"records\.jsonl, line 2"):
        list(read_records(path, kind))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"none\.jsonl"):
        list(read_records(tmp_path / "none.jsonl"))


WRITE_FOR_EVER = """
import dataclasses, itertools, pathlib, sys
from paceline.core.record import Record, RecordWriter

@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Counted(Record):
    number: int
    text: str

writer = RecordWriter(pathlib.Path(sys.argv[1]))
for number in itertools.count():
    writer.write(Counted(number=number, text="x" * 5000))
    if number == 20:
        print("ready", flush=True)
"""


def test_a_killed_writer_leaves_whole_records_in_order(tmp_path):
    path = tmp_path / "records.jsonl"
    command = [sys.executable, "-c", WRITE_FOR_EVER, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGKILL)
    numbers = [record["number"] for record in read_records(path)]
    assert len(numbers) > 20
    write(path, LAST)
    numbers_after = [record.get("number") for record in read_records(path)]
    assert numbers_after == [*numbers, None]
    assert numbers == list(range(len(numbers)))
