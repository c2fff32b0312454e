"""Tensors through real files, cut at random on both sides; and files that do not hold all."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

import pytest
import torch
from boxes import cuts, shapes
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.checkpoint.load import load, load_whole
from paceline.checkpoint.manifest import read_manifest
from paceline.checkpoint.save import save
from paceline.core.errors import DataError
from paceline.dist.world import World
from paceline.models.families.llama import PRESETS
from paceline.optim.parts import Part
from paceline.plan.layout import Box, Place
from paceline.plan.mesh import MeshConfig
from paceline.plan.plan import Plan

pytestmark = pytest.mark.cpu

ALONE = World(MeshConfig(), 0, torch.device("cpu"))
Pairs = list[tuple[str, Part]]


def saved(folder: Path, parts: Pairs) -> Path:
    return save(folder, 1, parts, Plan(), PRESETS["tiny"], ALONE)


def parts_of(name: str, whole: torch.Tensor, boxes: list[Box]) -> Pairs:
    """A tensor in parts, each of which owns all that it has."""
    shape = tuple(whole.shape)
    return [(name, Part(whole[box.slices].clone(), Place(shape, box, box))) for box in boxes]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_tensor_comes_back_however_it_was_cut_and_is_cut_now(data):
    wholes, before, after = {}, [], []
    for number in range(data.draw(st.integers(1, 3))):
        shape = data.draw(shapes.filter(lambda shape: 0 not in shape))
        dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int64]))
        name, box = f"model.{number}", Box.of_whole(shape)
        wholes[name] = torch.arange(box.num_elements).view(shape).to(dtype)
        before += parts_of(name, wholes[name], data.draw(cuts(box)))
        after += parts_of(name, torch.full(shape, -1, dtype=dtype), data.draw(cuts(box)))
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = saved(Path(folder), data.draw(st.permutations(before)))
        load(checkpoint, data.draw(st.permutations(after)), ALONE)
        again = load_whole(checkpoint, "model.")
    for name, part in after:
        assert torch.equal(part.local, wholes[name][part.place.box.slices])
    for name, whole in wholes.items():
        assert torch.equal(again[name], whole)
        assert again[name].dtype == whole.dtype


def test_files_that_do_not_hold_all_of_a_tensor_are_refused(tmp_path):
    whole = torch.arange(12.0).view(4, 3)
    rows = Box.of_whole((4, 3)).narrowed(0, range(3))
    checkpoint = saved(tmp_path, parts_of("model.a", whole, [rows]))
    wanted = torch.full((4, 3), -1.0)
    for read in (
        lambda: load(checkpoint, {"model.a": Part.of_whole(wanted)}, ALONE),
        lambda: load(checkpoint, parts_of("model.a", whole, [rows]), ALONE),  # asks for no more
        lambda: load_whole(checkpoint, "model."),
    ):
        with pytest.raises(DataError, match=r"model\.a: nobody holds \[3:4, 0:3\] of it") as caught:
            read()
        assert str(checkpoint) in caught.value.message
    assert (wanted == -1).all()


def test_metadata_of_other_tensors_than_the_manifests_is_refused(tmp_path):
    """The checksums are right: whoever wrote it wrote two things that do not fit."""
    first = saved(tmp_path / "first", parts_of("model.a", torch.ones(4), [Box.of_whole((4,))]))
    for name, other, why in (
        ("b", torch.ones(4), r"only the (files|manifest) of it has the tensor model\.(a|b)"),
        ("a", torch.ones(2, 2), r"model\.a is float32 \[2, 2\] in the files, float32 \[4\] in the"),
        ("a", torch.ones(4).bfloat16(), r"model\.a is bfloat16 \[4\] in the files, float32 \[4\]"),
    ):
        box = Box.of_whole(tuple(other.shape))
        mixed = tmp_path / str(other.dtype) / name / str(other.ndim)
        second = saved(mixed, parts_of(f"model.{name}", other, [box]))
        crossed = dataclasses.replace(read_manifest(first), files=read_manifest(second).files)
        crossed.commit(second)
        with pytest.raises(DataError, match=why):
            load_whole(second, "model.")


def test_another_dtype_is_refused(tmp_path):
    box = Box.of_whole((4,))
    checkpoint = saved(tmp_path, parts_of("model.a", torch.ones(4), [box]))
    wanted = parts_of("model.a", torch.ones(4).bfloat16(), [box])
    with pytest.raises(
        DataError, match=r"model\.a is of float32, this run holds bfloat16"
    ) as caught:
        load(checkpoint, wanted, ALONE)
    assert caught.value.hint.startswith('precision.params = "float32"')
