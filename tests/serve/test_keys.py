"""API keys: read from a file, and none but them open."""

from __future__ import annotations

import pytest

from paceline.core.errors import UsageError
from paceline.serve.api.keys import ApiKeys


def test_a_file_of_keys(tmp_path):
    path = tmp_path / "keys"
    path.write_text("# ours\n\nsk-one\n  sk-two  \n#sk-three\n")
    keys = ApiKeys.from_file(path)
    assert keys
    assert keys.opens("Bearer sk-one")
    assert keys.opens("Bearer sk-two")
    for wrong in ("", "sk-one", "Bearer sk-three", "Bearer #sk-three", "Bearer sk-oneX", "Bearer "):
        assert not keys.opens(wrong)
    assert not keys.opens("Bearer é\udcff".encode("utf-8", "replace").decode())
    assert "sk-one" not in repr(vars(keys))


def test_no_file_is_no_lock():
    keys = ApiKeys.from_file(None)
    assert not keys
    assert keys.opens("")


def test_an_empty_file_is_not_an_open_server(tmp_path):
    path = tmp_path / "keys"
    path.write_text("\n# nothing\n")
    with pytest.raises(UsageError, match="holds no key") as caught:
        ApiKeys.from_file(path)
    assert str(path) in caught.value.message


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00"])
def test_a_file_that_cannot_be_read(tmp_path, content):
    path = tmp_path / "keys"
    if content:
        path.write_bytes(content)
    with pytest.raises(UsageError, match="cannot read") as caught:
        ApiKeys.from_file(path)
    assert str(path) in caught.value.message
