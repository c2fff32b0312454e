"""Parquet files: the same documents as JSONL, and errors that name the file."""

from __future__ import annotations

import builtins
import sys

import pyarrow
import pyarrow.parquet
import pytest

from paceline.core.errors import DataError, MissingExtraError
from paceline.data.documents import Chat, Completion, Text
from paceline.data.sources import read_documents

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def write(path, columns, **options):
    pyarrow.parquet.write_table(pyarrow.table(columns), path, **options)
    return path


def broken(path) -> DataError:
    with pytest.raises(DataError) as caught:
        list(read_documents(path))
    assert str(path) in caught.value.message
    return caught.value


def test_rows_are_documents_in_the_order_of_the_file(tmp_path):
    texts = [f"document {n}" for n in range(2000)]
    path = write(
        tmp_path / "a.parquet", {"n": list(range(2000)), "text": texts}, row_group_size=700
    )
    found = list(read_documents(path))
    assert [document for document, _ in found] == [Text(text) for text in texts]
    assert [str(found[n][1]) for n in (0, 700, 1999)] == [
        f"{path}, row {n}" for n in (1, 701, 2000)
    ]


def test_chats_and_completions_have_columns_of_their_own(tmp_path):
    named = [{**CHAT[0], "name": "ann"}, CHAT[1]]
    path = write(tmp_path / "a.parquet", {"messages": [named, CHAT]})
    # What other rows lack, Parquet fills with null.
    assert [d for d, _ in read_documents(path)] == [Chat(tuple(named)), Chat(tuple(CHAT))]
    path = write(tmp_path / "b.parquet", {"prompt": ["a"], "completion": ["b"], "id": [1]})
    assert [d for d, _ in read_documents(path)] == [Completion("a", "b")]


def test_tools_are_refused_and_other_columns_are_not_read(tmp_path):
    path = write(tmp_path / "a.parquet", {"messages": [CHAT, CHAT], "tools": [None, "search"]})
    assert f"{path}, row 2: tools are not built" in broken(path).message


def test_reading_tells_about_the_bytes_of_the_file(tmp_path):
    path = write(tmp_path / "a.parquet", {"text": ["x"] * 1000}, row_group_size=300)
    told: list[int] = []
    list(read_documents(path, told.append))
    assert len(told) == 4
    assert path.stat().st_size - 4 <= sum(told) <= path.stat().st_size


def test_columns_that_make_no_document_are_named(tmp_path):
    path = write(tmp_path / "a.parquet", {"content": ["a"], "id": [1]})
    assert f"{path}, its columns: found content, id; expected" in broken(path).message


@pytest.mark.parametrize("values", [[1, 2], ["a", None]])
def test_a_value_of_a_wrong_type_is_named_by_its_row(tmp_path, values):
    path = write(tmp_path / "a.parquet", {"text": values})
    number = 1 + [isinstance(value, str) for value in values].index(False)
    assert f"{path}, row {number}: text must be a text, not " in broken(path).message


@pytest.mark.parametrize("kept", [0, 3, 100, -1, -9])
def test_a_file_cut_short_is_named(tmp_path, kept):
    path = write(tmp_path / "a.parquet", {"text": ["some text"] * 50})
    path.write_bytes(path.read_bytes()[:kept])
    assert "is not a whole Parquet file" in broken(path).message


def test_a_damaged_row_group_is_named(tmp_path):
    texts = [f"{n} " * 50 for n in range(400)]
    path = write(tmp_path / "a.parquet", {"text": texts}, row_group_size=100, compression="zstd")
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 400] = bytes(400)
    path.write_bytes(content)
    message = broken(path).message
    assert f"{path}, row group " in message
    assert " of 4 cannot be read" in message


def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", {"text": ["a"]})
    real = builtins.__import__

    def absent(name, *arguments, **options):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", absent)
    monkeypatch.delitem(sys.modules, "pyarrow.parquet")
    with pytest.raises(MissingExtraError) as caught:
        list(read_documents(path))
    assert "paceline[parquet]" in caught.value.hint
