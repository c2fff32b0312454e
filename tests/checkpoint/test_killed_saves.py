"""A kill at any point of a save leaves the newest complete checkpoint, and nothing half done."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from killing import Counter

from paceline.checkpoint import SAVERS
from paceline.checkpoint.base import SavedRun
from paceline.checkpoint.levels import candidates, level_folder
from paceline.checkpoint.load import load as load_checkpoint
from paceline.checkpoint.manifest import read_manifest, verify_files
from paceline.core.errors import RankError
from paceline.dist.testing import run_ranks
from paceline.dist.world import World
from paceline.models.families.llama import PRESETS
from paceline.optim.parts import Part
from paceline.plan.layout import Place
from paceline.plan.mesh import MeshConfig
from paceline.plan.plan import CheckpointConfig, Plan

pytestmark = [pytest.mark.cpu, pytest.mark.ranks]

SPEC = PRESETS["tiny"]


def parts_of(world: World, value: float) -> dict[str, Part]:
    ranks = world.mesh.num_ranks
    place = Place.of_whole((8 * ranks, 3)).rows(range(8 * world.rank, 8 * world.rank + 8))
    return {"model.a": Part(torch.full((8, 3), value), place)}


def save(folder: Path, steps: list[int], rank: int, mesh: MeshConfig, **config: Any) -> None:
    """Saves steps one after another, each full of its number."""
    world = World(mesh, rank, torch.device("cpu"))
    plan = Plan(mesh=mesh, checkpoint=CheckpointConfig(**config))
    run = SavedRun(folder, plan, SPEC, world)
    parts = parts_of(world, 0.0)
    saver = SAVERS.load(plan.checkpoint.method)(run, parts)
    for step in steps:
        for part in parts.values():
            part.tensor.fill_(step)
        saver.begin(step, parts)
        saver.fence()
        for part in parts.values():
            part.tensor.fill_(-1.0)
        saver.poll()
    saver.finish()
    saver.close()


def newest_step(folder: Path, levels: tuple[str, ...]) -> int:
    """The step of the newest checkpoint, once all that have a name have been found whole."""
    found = candidates(folder, levels)
    for candidate in found:
        manifest = read_manifest(candidate.path)
        verify_files(candidate.path, manifest)
        whole = Part.of_whole(torch.zeros(manifest.tensors["model.a"].shape))
        alone = World(MeshConfig(), 0, torch.device("cpu"))
        assert load_checkpoint(candidate.path, {"model.a": whole}, alone).step == candidate.step
        assert whole.tensor.unique().tolist() == [candidate.step]
    for level in levels:
        named = {path.name for path in level_folder(folder, level).glob("step-*")}
        assert named == {c.path.name for c in found if c.level == level}, "a name, and no manifest"
    return found[0].step


def killed_at(folder: Path, number: int, mesh: MeshConfig, dying: int = 0, **config: Any) -> bool:
    """Saves steps 3 and 4 and dies at the n-th operation; whether there were so many."""

    def work(rank: int) -> None:
        if rank == dying:
            Counter(number)
        save(folder, [3, 4], rank, mesh, **config)

    try:
        run_ranks(work, mesh.num_ranks, timeout_s=30)
    except RankError as error:
        assert f"rank {dying} died with exit code -9" in str(error)  # noqa: PT017
        return True
    return False


@pytest.mark.slow
@pytest.mark.parametrize("method", SAVERS)
def test_a_kill_at_any_operation_leaves_the_newest(tmp_path, method):
    mesh, outcomes, number = MeshConfig(), [], 1
    while True:
        folder = tmp_path / str(number)
        folder.mkdir()
        save(folder, [1, 2], 0, mesh, method=method, keep=2)
        was_killed = killed_at(folder, number, mesh, method=method, keep=2)
        outcomes.append(newest_step(folder, ("disk",)))
        if not was_killed:
            break
        save(folder, [5], 0, mesh, method=method, keep=2)  # the next run takes up from there
        assert newest_step(folder, ("disk",)) == 5
        names = {path.name for path in (folder / "checkpoints").iterdir()}
        assert names == {f"step-{outcomes[-1]}", "step-5"}, "nothing is left over"
        number += 1
    assert number > 60
    assert outcomes == sorted(outcomes), "committed once, and for good"
    assert set(outcomes) == {2, 3, 4}


@pytest.mark.parametrize("method", SAVERS)
def test_a_kill_leaves_the_newest_on_some_level(tmp_path, method):
    far = str(tmp_path / "far")
    levels, mesh, generator = ("disk", far), MeshConfig(), random.Random(3)
    outcomes = set()
    for number in sorted(generator.sample(range(1, 240), 12)):
        folder = tmp_path / str(number)
        folder.mkdir()
        save(folder, [1, 2], 0, mesh, method=method, keep=1, levels=levels)
        killed_at(folder, number, mesh, method=method, keep=1, levels=levels)
        outcomes.add(newest_step(folder, levels))
        save(folder, [5], 0, mesh, method=method, keep=1, levels=levels)
        assert [c.step for c in candidates(folder, levels)] == [5, 5]
    assert len(outcomes) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("dying", [0, 1])
@pytest.mark.parametrize("method", SAVERS)
def test_a_rank_that_is_killed_leaves_the_newest(tmp_path, dying, method):
    mesh = MeshConfig(dp_shard=2)
    outcomes = set()
    for number in range(5 + dying, 140, 15):
        folder = tmp_path / str(number)
        folder.mkdir()
        run_ranks(lambda rank, folder=folder: save(folder, [1, 2], rank, mesh, method=method), 2)
        killed_at(folder, number, mesh, dying, method=method)
        outcomes.add(newest_step(folder, ("disk",)))
    assert len(outcomes) >= 2
    assert outcomes <= {2, 3, 4}
