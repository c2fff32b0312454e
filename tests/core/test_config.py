from __future__ import annotations

import copy
import dataclasses
import tomllib
from dataclasses import dataclass, field
from datetime import date
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.core.config import Config, TextTable
from paceline.core.errors import ConfigError, UsageError


@dataclass(frozen=True, kw_only=True, slots=True)
class Leaf(Config):
    number: int
    scale: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Tree(Config):
    leaf: Leaf = field(default_factory=lambda: Leaf(number=1))
    extra: Leaf | None = None
    is_on: bool = False
    text: str | None = None
    texts: tuple[str, ...] = ()
    ratios: tuple[float, ...] | None = None
    interval: int | Literal["auto"] = 100
    stage: Literal[0, 1, 2] | None = None
    shape: Literal["ring", "line", "zigzag"] = "ring"
    named: TextTable = field(default_factory=TextTable)


FLOATS = st.floats(allow_nan=False)
LEAVES = st.builds(Leaf, number=st.integers(), scale=FLOATS)
TREES = st.builds(
    Tree,
    leaf=LEAVES,
    extra=st.none() | LEAVES,
    is_on=st.booleans(),
    text=st.none() | st.text(),
    texts=st.lists(st.text()).map(tuple),
    ratios=st.none() | st.lists(FLOATS).map(tuple),
    interval=st.integers() | st.just("auto"),
    stage=st.sampled_from([None, 0, 1, 2]),
    shape=st.sampled_from(["ring", "line", "zigzag"]),
    named=st.dictionaries(st.text(), st.text()).map(TextTable),
)


def problems_of(data: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    with pytest.raises(ConfigError) as caught:
        Tree.from_dict(data)
    return [dataclasses.astuple(problem) for problem in caught.value.problems]


@settings(deadline=None, max_examples=100)
@given(TREES)
def test_toml_round_trip(tree):
    assert Tree.from_dict(tree.to_dict()) == tree
    back = Tree.from_dict(tomllib.loads(tree.to_toml()))
    assert back == tree
    assert hash(back) == hash(tree)  # tuples came back as tuples


def test_an_optional_table_round_trips():
    tree = Tree(extra=Leaf(number=2))
    assert Tree.from_dict(tree.to_dict()) == tree
    assert Tree.from_dict({"extra": {"number": 2, "scale": 1}}) == tree
    assert Tree().with_overrides(["extra.number=2"]) == tree
    assert [p[:3] for p in problems_of({"extra": {"nummer": 2}})] == [
        ("extra.nummer", "2", "unknown key"),
        ("extra.number", "(absent)", "is required"),
    ]
    assert problems_of({"extra": 3}) == [("extra", "3", "must be a table", "")]


def test_a_table_of_texts():
    tree = Tree(named={"a.b": "x"})
    assert tree.named == {"a.b": "x"} == Tree.from_dict({"named": {"a.b": "x"}}).named
    assert copy.deepcopy(tree) == tree
    assert tree.with_overrides(["named.c=y"]).named == {"a.b": "x", "c": "y"}
    assert {tree, Tree(named={"a.b": "x"})} == {tree}
    rule = "must be a table whose values are texts"
    assert problems_of({"named": {"a": 1}}) == [("named", '{"a": 1}', rule, "")]
    assert problems_of({"named": "a"}) == [("named", '"a"', rule, "")]
    with pytest.raises(TypeError):
        tree.named["c"] = "y"


def test_a_file_round_trips_and_errors_name_it(tmp_path):
    path = tmp_path / "tree.toml"
    tree = Tree(text="\u00e9", texts=("a", "b"))
    path.write_text(tree.to_toml(), encoding="utf-8")
    assert Tree.from_toml(path) == Tree.from_toml(str(path)) == tree

    path.write_text("shape = 3")
    with pytest.raises(ConfigError, match=r"1 problem in .*tree\.toml:"):
        Tree.from_toml(path)


@pytest.mark.parametrize("content", [None, b"a = ", b"a = '\xff'"])
def test_a_file_that_is_missing_or_no_toml_is_a_usage_error(tmp_path, content):
    path = tmp_path / "tree.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=r"tree\.toml"):
        Tree.from_toml(path)


def test_absent_keys_mean_defaults_and_none_is_absent():
    assert Tree.from_dict({}) == Tree()
    data = Tree().to_dict()
    assert not {"text", "ratios", "extra", "stage"} & set(data)
    assert data["leaf"] == {"number": 1, "scale": 1.0}
    assert data["texts"] == []  # a list, as in TOML and JSON
    assert Tree.from_dict({"stage": None}) == Tree()


def test_integers_become_floats_where_floats_are_meant():
    tree = Tree.from_dict({"leaf": {"number": 1, "scale": 2}, "ratios": [1, 0.5]})
    assert type(tree.leaf.scale) is float
    assert [type(ratio) for ratio in tree.ratios] == [float, float]


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ({"is_on": 1}, ("is_on", "1", "must be true or false", "")),
        ({"leaf": {"number": True}}, ("leaf.number", "true", "must be an integer", "")),
        ({"leaf": {"number": 1.0}}, ("leaf.number", "1.0", "must be an integer", "")),
        ({"leaf": {"number": 1, "scale": True}}, ("leaf.scale", "true", "must be a number", "")),
        ({"leaf": {"number": 1, "scale": "1"}}, ("leaf.scale", '"1"', "must be a number", "")),
        ({"leaf": 3}, ("leaf", "3", "must be a table", "")),
        ({"leaf": {}}, ("leaf.number", "(absent)", "is required", "")),
        ({"text": 3}, ("text", "3", "must be a text", "")),
        ({"text": date(2026, 1, 2)}, ("text", "2026-01-02", "must be a text", "")),
        ({"texts": "abc"}, ("texts", '"abc"', "must be a list, each a text", "")),
        ({"texts": ["a", 1]}, ("texts", '["a", 1]', "must be a list, each a text", "")),
        ({"stage": 3}, ("stage", "3", "must be one of 0, 1, 2", "")),
        ({"stage": True}, ("stage", "true", "must be one of 0, 1, 2", "")),
        ({"interval": False}, ("interval", "false", 'must be an integer or one of "auto"', "")),
    ],
    ids=str,
)
def test_a_value_of_a_wrong_type_is_a_problem(data, problem):
    assert problems_of(data) == [problem]


@pytest.mark.parametrize(
    ("data", "hint"),
    [
        ({"shap": "ring"}, "did you mean shape?"),
        ({"leaf": {"number": 1, "skale": 2}}, "did you mean scale?"),
        ({"leaf": {"number": 1, "xyz": 2}}, "one of number, scale"),
        ({"shape": "zigzack"}, "did you mean zigzag?"),
        ({"shape": "?"}, "one of line, ring, zigzag"),
        ({"interval": "aut"}, "did you mean auto?"),
    ],
    ids=str,
)
def test_hints_list_near_names(data, hint):
    assert [problem[3] for problem in problems_of(data)] == [hint]


def test_all_problems_are_told_at_once():
    data = {"leaf": {"scale": "x", "b": 0}, "colour": "red", "shape": 3, "texts": [1], "is_on": 0}
    assert [problem[0] for problem in problems_of(data)] == [
        "leaf.scale",
        "leaf.b",
        "leaf.number",
        "colour",
        "shape",
        "texts",
        "is_on",
    ]


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("leaf.number=7", Tree(leaf=Leaf(number=7))),
        (" leaf.scale = 2", Tree(leaf=Leaf(number=1, scale=2.0))),
        ("is_on=true", Tree(is_on=True)),
        ("text='quoted'", Tree(text="quoted")),
        ("text=bare words = more", Tree(text="bare words = more")),
        ("text=", Tree(text="")),
        ("shape=line", Tree(shape="line")),
        ("interval=auto", Tree(interval="auto")),
        ('texts=["a","b"]', Tree(texts=("a", "b"))),
    ],
)
def test_overrides_are_toml_or_bare_text(assignment, expected):
    tree = Tree()
    assert tree.with_overrides([assignment]) == expected
    assert tree == Tree()


def test_later_overrides_win_and_the_rest_stays():
    tree = Tree(text="kept").with_overrides(["leaf.number=2", "is_on=true", "leaf.number=3"])
    assert tree == Tree(text="kept", leaf=Leaf(number=3), is_on=True)


@pytest.mark.parametrize("assignment", ["leaf.number", "=3", "leaf.=3", ".number=3", ""])
def test_a_malformed_override_is_a_usage_error(assignment):
    with pytest.raises(UsageError, match="cannot read the assignment") as caught:
        Tree().with_overrides([assignment])
    assert not isinstance(caught.value, ConfigError)


@pytest.mark.parametrize(
    ("assignment", "path"),
    [("lef.number=3", "lef"), ("is_on.a=3", "is_on"), ("leaf.number.a.b=3", "leaf.number")],
)
def test_an_override_of_nothing_names_its_path(assignment, path):
    with pytest.raises(ConfigError, match="in --set:") as caught:
        Tree().with_overrides([assignment])
    assert [problem.path for problem in caught.value.problems] == [path]


def test_a_required_key_is_told_by_its_path():
    with pytest.raises(ConfigError) as caught:
        Leaf.from_dict({}, source="here")
    assert str(caught.value) == "1 problem in here:\nnumber = (absent): is required"


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Tree().is_on = True
