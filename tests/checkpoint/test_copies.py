"""Copies that differ are found, named, and never saved."""

from __future__ import annotations

import math
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.checkpoint.copies import copied_regions, fingerprints, require_equal_copies
from paceline.checkpoint.manifest import complete_checkpoints
from paceline.checkpoint.save import save
from paceline.core.errors import RankError
from paceline.dist.testing import run_ranks
from paceline.dist.world import World
from paceline.models.families.llama import PRESETS
from paceline.optim.parts import Part
from paceline.plan.layout import Box, Place
from paceline.plan.mesh import MeshConfig
from paceline.plan.plan import Plan

pytestmark = pytest.mark.cpu

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool]


def print_of(tensor: torch.Tensor) -> tuple[int, int]:
    region = "a", Box.of_whole(tuple(tensor.shape))
    return fingerprints({"a": Part.of_whole(tensor)}, [region])[region]


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_one_flipped_bit_and_any_exchange_change_the_fingerprint(data):
    dtype = data.draw(st.sampled_from(DTYPES))
    shape = tuple(data.draw(st.lists(st.integers(1, 5), max_size=3)))
    size = math.prod(shape) * dtype.itemsize
    raw = bytearray(data.draw(st.binary(min_size=size, max_size=size)))
    if dtype == torch.bool:
        raw = bytearray(byte & 1 for byte in raw)

    def tensor(content: bytearray) -> torch.Tensor:
        return torch.frombuffer(bytearray(content), dtype=dtype).view(shape)

    before = print_of(tensor(raw))
    assert print_of(tensor(raw)) == before
    place = data.draw(st.integers(0, size - 1))
    flipped = bytearray(raw)
    flipped[place] ^= 1 if dtype == torch.bool else 1 << data.draw(st.integers(0, 7))
    assert print_of(tensor(flipped)) != before
    width = dtype.itemsize
    first, second = (width * data.draw(st.integers(0, size // width - 1)) for _ in range(2))
    swapped = bytearray(raw)
    swapped[first : first + width] = raw[second : second + width]
    swapped[second : second + width] = raw[first : first + width]
    assert (print_of(tensor(swapped)) == before) == (swapped == raw)


def test_large_tensors_are_summed_up_in_pieces_as_small_ones():
    values = torch.randint(-(2**31), 2**31, (600_001,), dtype=torch.int64).to(torch.int32)
    plain = int(values.long().sum())
    weighted = int((values.long() * torch.arange(1, 600_002)).sum())
    assert print_of(values) == (plain, weighted)


def test_signs_of_zeros_and_payloads_of_nans_count():
    zeros, nans = torch.tensor([0.0, -0.0]), torch.tensor([float("nan")])
    assert print_of(zeros) != print_of(zeros.abs())
    other = (nans.view(torch.int32) + 1).view(torch.float32)
    assert other.isnan().all()
    assert print_of(nans) != print_of(other)


def test_regions_with_copies_are_what_two_ranks_hold():
    rows = [Box((start, 0), (2, 3)) for start in (0, 2, 4)]
    whole, both = Box.of_whole((6, 3)), Box((1, 0), (2, 3))
    assert copied_regions([[("a", rows[0])], [("a", rows[1])], [("a", rows[2])]]) == frozenset()
    assert copied_regions([[("a", whole)], [("b", whole)]]) == frozenset()
    assert copied_regions([[("a", whole)], [("a", whole)]]) == {("a", whole)}
    # Neighbours that have some rows in common, and one that has two parts of a tensor.
    assert copied_regions([[("a", rows[0])], [("a", both)]]) == {("a", Box((1, 0), (1, 3)))}
    assert copied_regions([[("a", rows[0]), ("a", both)], []]) == frozenset()
    assert copied_regions([[("a", rows[0])], [("a", whole)]]) == {("a", rows[0])}
    assert copied_regions([[("a", Box((0, 0), (0, 3)))]] * 2) == frozenset()


def test_a_copy_is_summed_up_as_part_of_whatever_a_rank_has():
    whole = torch.arange(18.0).view(6, 3)
    region = "a", Box((1, 1), (2, 2))
    some = Box((1, 0), (3, 3))
    part = Part(whole[some.slices].clone(), Place((6, 3), some, some))
    assert fingerprints({"a": part}, [region]) == fingerprints(
        {"a": Part.of_whole(whole)}, [region]
    )
    assert fingerprints({"a": part}, [("a", Box((0, 0), (2, 2))), ("b", some)]) == {}


def test_a_difference_is_named_with_its_ranks():
    region = "model.norm.weight", Box.of_whole((4,))
    require_equal_copies([{region: (1, 2)}, {}, {region: (1, 2)}])
    with pytest.raises(RankError) as caught:
        require_equal_copies([{region: (1, 2)}, {region: (1, 3)}, {region: (1, 2)}])
    assert caught.value.message.startswith(
        "model.norm.weight: rank(s) 0, 2 and rank(s) 1 hold different bits of [0:4]"
    )
    assert "checkpoint before" in caught.value.hint


@pytest.mark.ranks
@pytest.mark.parametrize("mesh", [MeshConfig(dp_replicate=2), MeshConfig(tp=2), MeshConfig(cp=2)])
def test_copies_that_differ_are_not_saved(tmp_path, mesh):
    def work(rank: int) -> list[str]:
        world, messages = World(mesh, rank, torch.device("cpu")), []
        tensors = {"model.a": torch.arange(6.0).view(2, 3), "optimizer.a.step": torch.tensor(3.0)}
        parts = {name: Part.of_whole(tensor) for name, tensor in tensors.items()}
        for name in (None, "model.a", "optimizer.a.step"):
            if name is not None and rank == 1:
                tensors[name].view(-1).view(torch.int32)[-1] ^= 1
            try:
                save(tmp_path / str(name), 1, parts, Plan(), PRESETS["tiny"], world)
                messages.append("saved")
            except RankError as error:
                messages.append(error.message)
        return messages

    found = run_ranks(work, 2)
    assert found[0] == found[1]
    assert found[0][0] == "saved"
    assert found[0][1].startswith("model.a: rank(s) 0 and rank(s) 1 hold different bits of [0:2, 0")
    assert complete_checkpoints(tmp_path / "None")
    assert [path for path in Path(tmp_path).iterdir() if path.name != "None"] == []


def test_fingerprints_are_cheap():
    """20 M float32 elements, 80 MB."""
    tensor = torch.randn(20_000_000)
    start_s = time.perf_counter()
    print_of(tensor)
    time_s = time.perf_counter() - start_s
    assert time_s < 2, time_s  # 0.02 s on an idle core
