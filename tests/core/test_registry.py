from __future__ import annotations

import json
import sys

import pytest

from paceline.core.errors import UnknownNameError
from paceline.core.registry import NameTable

TABLE = NameTable("codec", {"json": "json:dumps", "broken": "no_such_module_of_ours:x"})


def test_a_table_is_a_mapping_in_its_own_order():
    assert list(TABLE) == ["json", "broken"]
    assert len(TABLE) == 2
    assert "json" in TABLE
    assert "jsom" not in TABLE
    assert TABLE["json"] == "json:dumps"
    assert TABLE.kind == "codec"


def test_a_table_keeps_its_own_entries():
    entries = {"a": "json:dumps"}
    table = NameTable("codec", entries)
    entries["b"] = "json:loads"
    assert list(table) == ["a"]


def test_load_imports_the_attribute():
    assert TABLE.load("json") is json.dumps


def test_nothing_is_imported_before_it_is_asked_for(monkeypatch, tmp_path):
    (tmp_path / "paceline_lazy_probe.py").write_text("value = 7\n")
    monkeypatch.syspath_prepend(tmp_path)
    table = NameTable("probe", {"lazy": "paceline_lazy_probe:value"})
    assert table["lazy"]
    assert "paceline_lazy_probe" not in sys.modules
    assert table.load("lazy") == 7
    monkeypatch.delitem(sys.modules, "paceline_lazy_probe")


def test_a_missing_module_is_not_taken_for_an_unknown_name():
    with pytest.raises(ModuleNotFoundError, match="no_such_module_of_ours"):
        TABLE.load("broken")


@pytest.mark.parametrize("ask", [TABLE.load, TABLE.__getitem__])
def test_an_unknown_name_lists_near_ones(ask):
    with pytest.raises(UnknownNameError, match="unknown codec 'jsom'") as caught:
        ask("jsom")
    assert caught.value.hint == "did you mean json?"


def test_get_has_a_default_as_in_any_mapping():
    assert TABLE.get("json") == "json:dumps"
    assert TABLE.get("jsom") is None
