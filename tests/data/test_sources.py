from __future__ import annotations

import json

import pytest

from paceline.core.errors import DataError, UnknownNameError, UsageError
from paceline.data import text
from paceline.data.documents import Chat, Completion, Text
from paceline.data.sources import (
    WeightedSource,
    parse_source,
    read_documents,
    source_files,
    source_identity,
)

STDLIB = "builtin:python-stdlib"
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


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


def documents(path) -> list:
    return [document for document, _ in read_documents(path)]


def lines(path, *records: object):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_a_folder_gives_its_text_files_in_a_fixed_order(tmp_path):
    for name in ("b.txt", "a/z.md", "a/c.jsonl", "a/model.bin", "d.py", "e.rst", "a/x.parquet"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("text")
    (tmp_path / "folder.txt").mkdir()  # named like a text, but none
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    names = ("a/c.jsonl", "a/x.parquet", "a/z.md", "b.txt", "d.py", "e.rst")
    expected = [tmp_path / name for name in names]
    assert source_files(str(tmp_path)) == expected
    assert source_files(str(tmp_path)) == source_files(str(tmp_path))


@pytest.mark.parametrize("name", ["README", "notes.unknown"])
def test_a_named_file_is_read_as_text_unless_its_name_says_otherwise(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"one\r\ntwo\rthree\n")
    assert source_files(str(path)) == [path]
    ((document, origin),) = read_documents(path)
    assert document == Text("one\ntwo\nthree\n")
    assert str(origin) == str(path)


def test_a_line_of_jsonl_is_a_document(tmp_path):
    path = tmp_path / "lines.jsonl"
    texts = ("one", "zw\u00f6lf\u2028", "")
    path.write_text("\n\n".join(json.dumps({"text": t, "n": 1}) for t in texts) + "\n  \n")
    assert documents(path) == [Text(text) for text in texts]
    assert [str(o) for _, o in read_documents(path)] == [f"{path}, line {n}" for n in (1, 3, 5)]


def test_the_kind_of_a_line_is_told_by_its_keys(tmp_path):
    path = lines(
        tmp_path / "lines.jsonl",
        {"text": "a", "id": 7},
        {"messages": CHAT, "prompt": "what it began with"},
        {"prompt": "2 + 2 = ", "completion": "4"},
        {"prompt": CHAT[:1], "completion": CHAT[1:]},
        {"prompt": [*CHAT, CHAT[0]], "completion": "bye"},
    )
    assert documents(path) == [
        Text("a"),
        Chat(tuple(CHAT)),
        Completion("2 + 2 = ", "4"),
        Chat(tuple(CHAT), first_answer=1),
        Chat((*CHAT, CHAT[0], {"role": "assistant", "content": "bye"}), first_answer=3),
    ]


def test_reading_tells_every_byte_of_a_file(tmp_path):
    path = lines(tmp_path / "a.jsonl", *[{"text": "x" * n} for n in range(9)])
    (tmp_path / "b.txt").write_text("text" * 99)
    for file in (path, tmp_path / "b.txt"):
        told: list[int] = []
        list(read_documents(file, told.append))
        assert sum(told) == file.stat().st_size


@pytest.mark.parametrize("content", [b"", b"a line\n", b"no end", b" \n\n \n" * 20, b"x" * 500])
def test_a_text_in_pieces_is_the_text(tmp_path, monkeypatch, content):
    monkeypatch.setattr(text, "_PIECE_BYTES", 16)
    monkeypatch.setattr(text, "_MAX_PIECE_BYTES", 64)
    path = tmp_path / "a.txt"
    whole = content + "  indented\r\nzw\u00f6lf \U0001f999\n\u3000wide\n".encode() * 9 + content
    path.write_bytes(whole)
    pieces = documents(path)
    assert "".join(p.text for p in pieces) == whole.decode().replace("\r\n", "\n")
    assert [p.is_start for p in pieces] == [True, *[False] * (len(pieces) - 1)]
    assert [p.is_end for p in pieces] == [*[False] * (len(pieces) - 1), True]
    assert len(pieces) > 3
    if len(content) < 64:  # there are lines to cut at
        assert not any(piece.text[0].isspace() for piece in pieces[1:])
        assert all(piece.text.endswith("\n") for piece in pieces[:-1])


def test_the_standard_library_is_there_without_its_tests():
    files = source_files(STDLIB)
    assert len(files) > 300
    assert {"argparse.py", "dataclasses.py"} <= {file.name for file in files}
    assert not [file for file in files if "test" in file.parts or "site-packages" in file.parts]
    assert files == sorted(files)


def test_what_is_not_there_is_refused(tmp_path):
    assert "no such file or folder" in refused(tmp_path / "nothing.txt").message
    assert f"{tmp_path} holds no text" in refused(tmp_path).message


def test_an_unknown_builtin_names_the_known_one():
    with pytest.raises(UnknownNameError) as caught:
        source_files("builtin:python-stdlb")
    assert STDLIB in caught.value.hint


NOT_MESSAGES = "must be a list of messages, not"
BROKEN = {
    '{"text": "cut': "not JSON: ",
    "{}": "found no keys; expected",
    '{"texts": "misspelt", "n": 1}': "found texts, n; expected",
    '{"prompt": "alone"}': "found prompt; expected",
    '{"text": "a", "messages": []}': "holds text and messages",
    '{"text": 5}': "text must be a text, not a number",
    '{"text": null}': "text must be a text, not null",
    '{"prompt": "a", "completion": ["b"]}': "completion must be a text, not a list",
    '{"prompt": 1, "completion": "b"}': f"prompt {NOT_MESSAGES} a number",
    '{"messages": "hi"}': f"messages {NOT_MESSAGES} a text",
    '{"messages": []}': "messages is empty",
    '{"messages": ["hi"]}': "messages[0]: a text, not an object",
    '{"messages": [{"role": "user"}]}': "messages[0]: content must be a text, not absent",
    '{"messages": [{"role": 1, "content": "a"}]}': "messages[0]: role must be a text, not a number",
    '{"messages": [{"role": "user", "content": "a"}], "tools": [1]}': "tools are not built",
    "5": "a number, not an object",
    '["text"]': "a list, not an object",
    "plain text": "not JSON: ",
    "1" * 5000: "not JSON: ",  # more digits than Python reads
    "[" * 100_000: "not JSON: ",
}


@pytest.mark.parametrize("line", BROKEN, ids=range(len(BROKEN)))
def test_a_broken_line_is_named_by_its_number(tmp_path, line):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"text": "good"}\n\n' + line + '\n{"text": "good"}\n')
    error = broken(path)
    assert error.message.startswith(f"{path}, line 3: {BROKEN[line]}")
    assert len(error.message) < 500
    assert '{"messages": [{' in str(error) or "leave" in error.hint


@pytest.mark.parametrize("line", [b'{"text": "\xff"}', b'{"text": "\\ud800"}'])
def test_a_line_that_is_not_utf_8_is_named_by_its_number(tmp_path, line):
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"text": "good"}\n' * 5000 + line)
    assert f"{path}, line 5001: " in broken(path).message
    assert "not UTF-8" in broken(path).message


@pytest.mark.parametrize("lead", [20_000, 1_000_000])
def test_a_text_that_is_not_utf_8_is_named_with_the_byte(tmp_path, lead):
    path = tmp_path / "text.txt"
    path.write_bytes(b"line\n" * (lead // 5) + b"\xe9 latin")
    assert broken(path).message == f"{path} is not UTF-8 at byte {lead}"


def test_bytes_that_are_no_text_at_all_are_refused(tmp_path):
    path = tmp_path / "model.bin"
    path.write_bytes(b"\x80" * 5_000_000)
    assert "is not UTF-8 at byte 0" in broken(path).message


@pytest.mark.parametrize("name", ["gone.txt", "gone.jsonl"])
def test_a_file_that_cannot_be_read_is_named(tmp_path, name):
    assert broken(tmp_path / name).message.endswith(
        "gone" + name[4:] + ": No such file or directory"
    )


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


def test_a_weight_follows_the_last_sign(tmp_path):
    there = tmp_path / "lr=0.5"
    there.write_text("text")
    assert parse_source("a.txt") == WeightedSource("a.txt", 1.0)
    assert parse_source("a.txt=0.25") == WeightedSource("a.txt", 0.25)
    assert parse_source("a=b.txt=2") == WeightedSource("a=b.txt", 2.0)
    assert parse_source(f"{STDLIB}=3") == WeightedSource(STDLIB, 3.0)
    assert parse_source(str(there)) == WeightedSource(str(there), 1.0)
    assert parse_source(f"{there}=2") == WeightedSource(str(there), 2.0)


@pytest.mark.parametrize("weight", ["", "0", "-1", "nan", "inf", "many", "b.txt"])
def test_a_bad_weight_is_refused(weight):
    with pytest.raises(UsageError, match=f"{weight!r} is not a weight") as caught:
        parse_source(f"a.txt={weight}")
    assert caught.value.hint.startswith("write SRC=WEIGHT with a positive number")
