"""Shares of heads and rows, and the hand-written rules of our own decoder."""

from __future__ import annotations

from dataclasses import replace

import pytest

from paceline.models.families import FAMILIES, family
from paceline.plan.tensor_rules import WHOLE, Split, decoder_rules, even_share, head_share


@pytest.mark.parametrize("tp", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("size", [1, 4, 7, 61])
def test_even_shares_cover_everything_once(size, tp):
    shares = [even_share(size, tp, rank) for rank in range(tp)]
    assert [index for share in shares for index in share] == list(range(size))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(8, 8), (8, 2), (6, 3), (9, 3), (5, 1)])
def test_heads_are_shared_out(num_heads, num_kv_heads):
    group = num_heads // num_kv_heads
    for tp in range(1, num_heads + 1):
        shares = [head_share(num_heads, num_kv_heads, tp, rank) for rank in range(tp)]
        assert [head for share in shares for head in share.query] == list(range(num_heads))
        assert [key for share in shares for key in share.owned_key] == list(range(num_kv_heads))
        for share in shares:
            keys = [share.key[local] for local in share.key_of_query]
            assert keys == [head // group for head in share.query]
            assert set(share.key) == set(keys), "no key is there for nothing"
            assert set(share.owned_key) <= set(share.key)


def test_heads_without_a_share():
    for arguments in ((4, 2, 5, 0), (4, 2, 2, 2), (4, 3, 2, 0)):
        with pytest.raises(ValueError, match="have no share for rank"):
            head_share(*arguments)


def test_uneven_heads():
    share = head_share(5, 5, 2, 1)
    assert (share.query, share.key, share.owned_key) == (range(2, 5), range(2, 5), range(2, 5))
    copied = head_share(6, 2, 4, 2)
    assert (copied.query, copied.key, copied.owned_key) == (range(3, 4), range(1, 2), range(1, 2))
    last = head_share(6, 2, 4, 3)
    assert (last.query, last.key, last.owned_key) == (range(4, 6), range(1, 2), range(2, 2))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_parameter_of_a_family_has_a_rule(name):
    module = family(name)
    spec = module.PRESETS["tiny"]
    rules = decoder_rules(spec, 2)
    assert rules.keys() == module.weight_map(spec).keys()
    kinds = {key.rsplit(".", 2)[-2]: split.dim for key, split in rules.items() if "weight" in key}
    assert kinds["query"] == kinds["key"] == kinds["value"] == kinds["embedding"] == 0
    assert kinds["output"] == 1
    assert kinds["norm"] is None


def test_the_rows_of_a_decoder():
    spec = replace(family("llama").PRESETS["tiny"], num_heads=6, num_kv_heads=2, head_dim=8)
    rules = decoder_rules(replace(spec, d_ffn=7, vocab_size=9), 4)
    block = "blocks.0."
    queries = ((range(8),), (range(8, 24),), (range(24, 32),), (range(32, 48),))
    keys = ((range(8),), (range(8),), (range(8, 16),), (range(8, 16),))
    assert rules[block + "attention.query.weight"] == Split(0, queries)
    assert rules[block + "attention.output.weight"] == Split(1, queries)
    assert rules[block + "attention.key.weight"] == Split(0, keys)
    assert rules[block + "attention.value.weight"].copied == frozenset(range(16))
    assert rules[block + "attention.query.weight"].copied == frozenset()
    hidden = ((range(1),), (range(1, 3),), (range(3, 5),), (range(5, 7),))
    assert rules[block + "ffn.gate.weight"] == Split(0, hidden)
    assert rules[block + "ffn.down.weight"] == Split(1, hidden)
    assert rules["embedding.weight"].indices(1) == [2, 3]
    assert rules[block + "attention_norm.weight"] == rules["norm.weight"] == WHOLE
