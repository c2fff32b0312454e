from __future__ import annotations

import json

import pytest

from paceline.core.errors import DataError, UnknownNameError, UsageError
from paceline.data.sources import read_documents, source_files, source_identity

STDLIB = "builtin:python-stdlib"


def refused(source: object) -> UsageError:
    with pytest.raises(UsageError) as caught:
        source_files(str(source))
    assert caught.value.hint
    return caught.value


def broken(path) -> DataError:
    with pytest.raises(DataError) as caught:
        list(read_documents(path))
    assert str(path) in caught.value.message
    return caught.value


def test_a_folder_gives_its_text_files_in_a_fixed_order(tmp_path):
    for name in ("b.txt", "a/z.md", "a/c.jsonl", "a/model.bin", "d.py", "e.rst", "a/x.parquet"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("text")
    (tmp_path / "folder.txt").mkdir()  # named like a text, but none
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    expected = [tmp_path / name for name in ("a/c.jsonl", "a/z.md", "b.txt", "d.py", "e.rst")]
    assert source_files(str(tmp_path)) == expected
    assert source_files(str(tmp_path)) == source_files(str(tmp_path))


def test_a_file_is_read_whatever_its_name(tmp_path):
    path = tmp_path / "README"
    path.write_text("one\ntwo\n")
    assert source_files(str(path)) == [path]
    assert list(read_documents(path)) == ["one\ntwo\n"]


def test_a_line_of_jsonl_is_a_document(tmp_path):
    path = tmp_path / "lines.jsonl"
    lines = [json.dumps({"text": text, "n": 1}) for text in ("one", "zw\u00f6lf\u2028", "")]
    path.write_text("\n\n".join(lines) + "\n  \n", encoding="utf-8")
    assert list(read_documents(path)) == ["one", "zw\u00f6lf\u2028", ""]


def test_the_standard_library_is_there_without_its_tests():
    files = source_files(STDLIB)
    assert len(files) > 300
    assert {"argparse.py", "dataclasses.py"} <= {file.name for file in files}
    assert not [file for file in files if "test" in file.parts or "site-packages" in file.parts]
    assert files == sorted(files)


def test_what_is_not_there_is_refused(tmp_path):
    assert "no such file or folder" in refused(tmp_path / "nothing.txt").message
    assert f"{tmp_path} holds no text" in refused(tmp_path).message


@pytest.mark.parametrize("name", ["a.parquet", "missing.parquet"])
def test_parquet_is_refused_as_not_built(tmp_path, name):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    assert "reading .parquet is not built in this version" in refused(tmp_path / name).message


def test_an_unknown_builtin_names_the_known_one():
    with pytest.raises(UnknownNameError) as caught:
        source_files("builtin:python-stdlb")
    assert STDLIB in caught.value.hint


@pytest.mark.parametrize(
    "line",
    [
        '{"text": "cut',
        "{}",
        '{"texts": "misspelt"}',
        '{"text": 5}',
        '{"text": null}',
        "5",
        '["text"]',
        "plain text",
        "1" * 5000,  # more digits than Python reads
        "[" * 100_000,
    ],
)
def test_a_broken_line_is_named_by_its_number(tmp_path, line):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"text": "good"}\n\n' + line + '\n{"text": "good"}\n')
    error = broken(path)
    assert f"{path}, line 3: no text in it" in error.message
    assert error.hint == 'write {"text": "..."} on each line'


@pytest.mark.parametrize("line", [b'{"text": "\xff"}', b'{"text": "\\ud800"}'])
def test_a_line_that_is_not_utf_8_is_named_by_its_number(tmp_path, line):
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"text": "good"}\n' * 5000 + line)
    assert f"{path}, line 5001: not UTF-8" in broken(path).message


def test_a_text_that_is_not_utf_8_is_named_with_the_byte(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"x" * 20_000 + b"\xe9 latin")
    assert broken(path).message == f"{path} is not UTF-8 at byte 20000"


def test_the_identity_of_a_source_changes_with_its_files(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")
    seen = [source_identity(str(tmp_path))]
    (tmp_path / "b.txt").write_text("two")
    seen.append(source_identity(str(tmp_path)))
    path.write_text("three")
    seen.append(source_identity(str(tmp_path)))
    path.rename(tmp_path / "c.txt")
    seen.append(source_identity(str(tmp_path)))
    assert len({json.dumps(identity) for identity in seen}) == 4
    assert source_identity(str(tmp_path)) == seen[-1]
    assert source_identity(STDLIB) == source_identity(STDLIB)
