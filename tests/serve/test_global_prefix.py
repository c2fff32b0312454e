"""A job that is known whole: its order, and that it computes as little as its prefixes admit."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracle import answer_alone, ask_ids, generate, oracle_engine

from paceline.serve.schedule.base import Asked, arrange
from paceline.serve.schedule.global_prefix import global_prefix
from paceline.serve.schedule.stall_free import stall_free

pytestmark = pytest.mark.cpu

SIZE = 2
PROMPTS = st.lists(
    st.lists(st.integers(1, 2), min_size=1, max_size=9), min_size=1, max_size=9
)  # two tokens: most prompts share something

PASSED = [
    [int(digit) for digit in digits]
    for digits in [
        "11",
        "1122",
        "1112112212",
        "2211112111111",
        "22122222",
        "122222112112",
        "222121122222",
        "1221122211221",
        "121",
    ]
]
"""If these may pass each other, one computes again what another's room took."""


def fewest_computed(prompts: list[list[int]]) -> int:
    """Tokens of prompts that no engine with blocks can save, whatever its order and memory.

    A block's content is computed once, but for those who end with it: their last token is always
    computed, and their last block with it.
    """
    fewest = 0
    contents = {
        tuple(prompt[: end * SIZE]) for prompt in prompts for end in range(1, 1 + len(prompt))
    }
    for content in contents:
        if len(content) % SIZE == 0:
            num_ending = sum(tuple(prompt) == content for prompt in prompts)
            num_with = sum(tuple(prompt[: len(content)]) == content for prompt in prompts)
            fewest += SIZE * max(1, num_ending) if num_with else 0
    return fewest + sum(len(prompt) % SIZE for prompt in prompts)


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ([[1, 2, 1]], 3),
        ([[1, 2, 1], [1, 2, 2]], 4),
        ([[1, 2], [1, 2]], 4),
        ([[1, 2], [1, 2, 1]], 3),
        ([[1, 2, 1, 2], [1, 2, 1, 2, 1], [1, 2, 2]], 6),
    ],
)
def test_the_fewest_by_hand(prompts, expected):
    assert fewest_computed(prompts) == expected


@settings(deadline=None, max_examples=150, database=None, report_multiple_bugs=False)
@given(
    PROMPTS,
    st.lists(st.integers(1, 7), min_size=9, max_size=9),
    st.integers(0, 6),
    st.integers(1, 4),
    st.sampled_from([1, 3, 16]),
)
@example(PASSED, [14, 14, 9, 2, 2, 14, 1, 1, 1], 2, 2, 3)
def test_a_job_computes_what_its_tree_of_prefixes_requires(
    prompts, lengths, num_spare, max_sequences, max_batch_tokens
):
    """However few blocks there are."""
    requests = [ask_ids(prompt, length) for prompt, length in zip(prompts, lengths, strict=False)]
    largest = max(len(request.prompt_ids) + request.max_tokens for request in requests)
    engine, oracle = oracle_engine(
        global_prefix,
        num_blocks=-(-largest // SIZE) + num_spare,
        block_size=SIZE,
        max_batch_tokens=max_batch_tokens,
        max_sequences=max_sequences,
    )
    answers = generate(engine, oracle, requests)
    assert answers == [answer_alone(request) for request in requests]
    assert engine.book.num_preempted == 0
    assert oracle.num_computed == fewest_computed(prompts)


def test_the_online_cache_computes_more_where_blocks_are_few():
    """Prompts of four documents, one after the other: what will be wanted again is evicted."""
    documents = [[document] * 16 for document in (1, 2, 3, 4)]
    requests = [
        ask_ids([*documents[number % 4], 10 + number // 4], 4, tenant="") for number in range(16)
    ]
    computed = {}
    for policy in (stall_free, global_prefix):
        engine, oracle = oracle_engine(policy, num_blocks=12, block_size=SIZE, max_sequences=2)
        assert generate(engine, oracle, requests) == [answer_alone(each) for each in requests]
        computed[policy] = oracle.num_computed
    assert computed[global_prefix] == 4 * 16 + 16
    assert computed[stall_free] > 3 * computed[global_prefix]


@given(PROMPTS, st.sampled_from([1, 2, 3]))
def test_an_order_names_every_request_once_and_keeps_groups_together(prompts, block_size):
    job = [Asked(b"", prompt, 1) for prompt in prompts]
    order = global_prefix.arrange(job, block_size)
    assert sorted(order) == list(range(len(job)))
    for length in range(block_size, 10, block_size):
        begins = [tuple(prompts[place][:length]) for place in order]
        groups = [
            now for now, before in zip(begins, [None, *begins], strict=False) if now != before
        ]
        full = [group for group in groups if len(group) == length]
        assert len(full) == len(set(full)), "a group is parted"


def test_long_answers_come_first():
    job = [
        Asked(b"", [1] * 8, 1),
        Asked(b"", [2] * 8, 90),
        Asked(b"", [1] * 8 + [3] * 8, 50),
        Asked(b"", [1] * 8 + [4] * 8, 70),
    ]
    assert global_prefix.arrange(job, 4) == [1, 0, 3, 2]


def test_tenants_are_not_one_group():
    job = [Asked(root, [1, 1, 1], answer) for root, answer in [(b"a", 5), (b"b", 9), (b"a", 5)]]
    assert global_prefix.arrange(job, 2) == [1, 0, 2]


def test_other_policies_take_a_job_as_it_comes():
    job = [Asked(b"", [1], 1), Asked(b"", [2], 9)]
    assert list(arrange(stall_free, job, 4)) == [0, 1]
    assert list(arrange(global_prefix, job, 4)) == [1, 0]


def test_a_long_prompt_needs_no_stack():
    assert global_prefix.arrange([Asked(b"", [1] * 5000, 1)], 1) == [0]
