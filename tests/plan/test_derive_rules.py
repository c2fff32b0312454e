"""Rules from graphs that are written down here."""

from __future__ import annotations

from dataclasses import replace

import pytest

from paceline.core.errors import ConfigError, UsageError
from paceline.plan.derive_rules import derive
from paceline.plan.module_graph import Leaf, Link, ModuleGraph, Span

D, F = 6, 7


def linear(name: str, inputs: int, outputs: int, *links: Link, bias: bool = False) -> Leaf:
    shapes = {"weight": (outputs, inputs)} | ({"bias": (outputs,)} if bias else {})
    return Leaf(name, "linear", shapes, links)


def each(source: str, width: int) -> Link:
    return Link(source, (Span(range(width), range(width), True),))


def blocks(source: str, num_columns: int, num_heads: int, num_sources: int) -> Link:
    """Heads, each of whose columns reads all rows of its source head."""
    size = num_columns // num_heads
    group = num_heads // num_sources
    return Link(
        source,
        tuple(
            Span(
                range(head * size, (head + 1) * size),
                range(head // group * size, (head // group + 1) * size),
                False,
            )
            for head in range(num_heads)
        ),
        ("matmul",),
    )


NORM = Leaf("norm", "other", {"weight": (D,)})
FFN = ModuleGraph(
    (
        NORM,
        linear("gate", D, F, each("norm", D), bias=True),
        linear("up", D, F, each("norm", D)),
        linear("down", F, D, each("gate", F), each("up", F), bias=True),
    ),
    outputs=frozenset({"down"}),
)
HEADS = ModuleGraph(
    (
        NORM,
        linear("query", D, 12, each("norm", D)),
        linear("key", D, 6, each("norm", D)),
        linear("value", D, 6, each("norm", D)),
        linear(
            "out",
            12,
            D,
            blocks("query", 12, 4, 4),
            blocks("key", 12, 4, 2),
            blocks("value", 12, 4, 2),
        ),
    )
)


def changed(graph: ModuleGraph, name: str, **values: object) -> ModuleGraph:
    leaves = [replace(leaf, **values) if leaf.name == name else leaf for leaf in graph.leaves]
    return replace(graph, leaves=tuple(leaves))


def test_a_gated_feed_forward_is_split_unevenly():
    rules = derive(FFN, 3)
    shares = ((range(2),), (range(2, 4),), (range(4, 7),))
    for name in ("gate.weight", "gate.bias", "up.weight"):
        assert (rules.splits[name].dim, rules.splits[name].shares) == (0, shares)
    assert (rules.splits["down.weight"].dim, rules.splits["down.weight"].shares) == (1, shares)
    assert "down.bias" not in rules.splits
    assert rules.roles == {"gate": "column", "up": "column", "down": "row"}
    (group,) = rules.groups
    assert (group.num_parts, group.is_heads) == (F, False)


def test_heads_are_split_and_key_heads_copied():
    two = derive(HEADS, 2)
    assert two.splits["query.weight"].shares == ((range(6),), (range(6, 12),))
    assert two.splits["key.weight"].shares == ((range(3),), (range(3, 6),))
    four = derive(HEADS, 4)
    assert four.splits["query.weight"].indices(1) == [3, 4, 5]
    first, second = (range(3),), (range(3, 6),)
    assert four.splits["value.weight"].shares == (first, first, second, second)
    assert four.splits["key.weight"].copied == frozenset(range(6))
    (group,) = four.groups
    assert (group.num_parts, group.num_units, group.is_heads) == (4, 2, True)
    with pytest.raises(ConfigError, match=r"mesh\.tp = 3: does not share out the 4 heads") as e:
        derive(HEADS, 3)
    assert e.value.problems[0].hint == "use 2 or 4"


def reader(*links: Link) -> Leaf:
    return linear("reader", D, D, *links)


@pytest.mark.parametrize(
    ("graph", "reason"),
    [
        (
            replace(FFN, leaves=(*FFN.leaves, Leaf("other", "other", {}, (each("up", F),)))),
            "other reads up too",
        ),
        (replace(FFN, outputs=frozenset({"up"})), "the model's output is made from up too"),
        (changed(FFN, "gate", num_calls=2), "it is called 2 times in one pass"),
        (replace(FFN, mixed=frozenset({"up"})), "up is read as a whole too"),
        (
            changed(FFN, "up", shapes={"weight": (F + 2, D)}),
            "2 outputs of up are read by nothing",
        ),
        (
            replace(
                FFN, leaves=(*FFN.leaves, Leaf("n", "other", {}, (each("up", F),), 2, False, True))
            ),
            "n reads up too, and it is called 2 times in one pass",
        ),
        (replace(FFN, direct=frozenset({"up.weight"})), "up.weight is used outside up too"),
        (replace(FFN, tied=(("up.weight", "x.weight"),)), "up.weight is x.weight too"),
        (
            changed(FFN, "down", links=(*FFN.leaves[3].links, each("scale", F))),
            "it is made from scale too",
        ),
        (
            changed(FFN, "down", links=(*FFN.leaves[3].links, each("", F))),
            "it is made from the residual stream too",
        ),
        (
            changed(FFN, "down", links=(blocks("gate", F, 1, 1), each("up", F))),
            "matmul mixes all of its input's features",
        ),
    ],
)
def test_what_is_open_is_left_whole(graph, reason):
    with pytest.raises(UsageError, match=r"no layer can be split over 2 tensor ranks") as e:
        derive(graph, 2)
    assert reason in str(e.value)
    both = replace(graph, leaves=(*graph.leaves, *HEADS.leaves[1:]))
    rules = derive(both, 2)
    assert {"gate", "up", "down"} <= rules.whole.keys()
    assert reason in rules.whole.values()
    assert rules.roles["out"] == "row"


def test_too_few_features():
    with pytest.raises(UsageError, match="it has 7 features for 8 ranks"):
        derive(FFN, 8)


VOCABULARY = ModuleGraph(
    (
        Leaf("words", "embedding", {"weight": (11, D)}, reads_tokens=True),
        Leaf("places", "embedding", {"weight": (11, D)}),
        linear("head", D, 11, each("norm", D)),
    ),
    outputs=frozenset({"head"}),
)


def test_the_vocabulary():
    rules = derive(VOCABULARY, 2)
    assert rules.roles == {"words": "vocabulary", "head": "gathered"}
    assert rules.splits["words.weight"].shares == ((range(5),), (range(5, 11),))
    assert rules.whole == {"places": "its output is read as a whole"}
    tied = replace(VOCABULARY, tied=(("words.weight", "head.weight"),))
    assert derive(tied, 2).roles == rules.roles
    # Of a tied pair that is used elsewhere neither is split.
    with pytest.raises(UsageError, match=r"words\.weight is used outside words too"):
        derive(replace(tied, direct=frozenset({"words.weight"})), 2)


def test_what_is_asked_for():
    both = replace(FFN, leaves=(*VOCABULARY.leaves[:2], *FFN.leaves))
    assert derive(both, 2, {"gate": "whole", "up": "whole", "down": "whole"}).roles == {
        "words": "vocabulary"
    }
    assert derive(both, 2, {"places": "vocabulary"}).roles["places"] == "vocabulary"
    for asked, message in (
        ({"gate": "whole"}, "split together with down, up"),
        ({"gate": "row"}, "cannot be row: what it computes makes it column"),
        ({"words": "column"}, "cannot be column"),
        ({"words": "columns"}, "did you mean column"),
        ({"norm": "whole"}, "matches no linear or embedding"),
    ):
        with pytest.raises(UsageError, match=message):
            derive(both, 2, asked)
