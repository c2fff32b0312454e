"""What is broken is never loaded, by any way that reads a checkpoint, and is named."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from paceline.checkpoint.export import export
from paceline.checkpoint.load import load, load_whole
from paceline.checkpoint.manifest import read_manifest, verify_files
from paceline.checkpoint.save import save
from paceline.core.errors import DataError
from paceline.dist.testing import run_ranks
from paceline.dist.world import World
from paceline.models.hub import resolve
from paceline.optim import OPTIMIZERS
from paceline.parallel.apply import apply
from paceline.plan.mesh import MeshConfig
from paceline.plan.plan import Plan
from paceline.train.state import State

pytestmark = [pytest.mark.cpu, pytest.mark.ranks]

MODEL = "random:llama:tiny"
SHARDS = ("__0_0.distcp", "__1_0.distcp")


def state_of(plan: Plan, rank: int, seed: int) -> tuple[State, World]:
    source = resolve(MODEL, seed=seed)
    world = World(plan.mesh, rank, torch.device("cpu"))
    model = apply(source.spec, source.weights, plan, world)
    return State(model, OPTIMIZERS.load("adamw")(model.parameters(), plan.optimizer)), world


@pytest.fixture(scope="module")
def twins(tmp_path_factory) -> tuple[Path, Path]:
    """Two checkpoints of the same step, by two ranks each, of two runs."""
    folder, plan = tmp_path_factory.mktemp("twins"), Plan(mesh=MeshConfig(dp_shard=2))

    def work(rank: int) -> None:
        for seed in (0, 1):
            state, world = state_of(plan, rank, seed)
            spec = resolve(MODEL).spec
            save(folder / str(seed), 3, state.parts(), plan, spec, world)

    run_ranks(work, 2)
    return folder / "0" / "step-3", folder / "1" / "step-3"


@pytest.fixture
def spoiled(twins, tmp_path) -> Path:
    """A copy of the first to spoil."""
    return Path(shutil.copytree(twins[0], tmp_path / "step-3"))


def require_refused(checkpoint: Path, name: str) -> None:
    """Every reader fails, names the file, and leaves what it was to fill as it was."""
    state, world = state_of(Plan(), 0, 5)
    before = {n: part.local.clone() for n, part in state.parts().items()}
    out = checkpoint.parent / "out"

    def verify() -> None:
        verify_files(checkpoint, read_manifest(checkpoint))

    readers: dict[str, Callable[[], Any]] = {
        "load": lambda: load(checkpoint, state.parts(), world),
        "load_whole": lambda: load_whole(checkpoint, "model."),
        "verify": verify,
        "export": lambda: export(checkpoint, resolve(MODEL).files, out),
    }
    for reader, read in readers.items():
        with pytest.raises(DataError) as caught:
            read()
        assert str(checkpoint / name) in caught.value.message, reader
    assert not out.exists()
    assert all(torch.equal(part.local, before[n]) for n, part in state.parts().items())


def test_a_whole_one_is_read(spoiled):
    state, world = state_of(Plan(), 0, 5)
    assert load(spoiled, state.parts(), world).step == 3
    expected = resolve(MODEL, seed=0).weights.read("embedding.weight")
    assert torch.equal(state.parts()["model.embedding.weight"].local, expected)


@pytest.mark.parametrize("name", [*SHARDS, ".metadata"])
def test_a_missing_file_is_never_loaded(spoiled, name):
    (spoiled / name).unlink()
    require_refused(spoiled, name)


@pytest.mark.parametrize("name", [*SHARDS, ".metadata", "manifest.json"])
def test_a_truncated_file_is_never_loaded(spoiled, name):
    os.truncate(spoiled / name, (spoiled / name).stat().st_size - 1)
    require_refused(spoiled, name)


@pytest.mark.parametrize("name", [*SHARDS, ".metadata", "manifest.json"])
def test_a_flipped_bit_is_never_loaded(spoiled, name):
    content = bytearray((spoiled / name).read_bytes())
    # Inside a number of the manifest's, where JSON stays JSON.
    place = content.index(b'"step": 3') + 8 if name == "manifest.json" else len(content) // 2
    content[place] ^= 1
    (spoiled / name).write_bytes(content)
    require_refused(spoiled, name)


def test_exchanged_shards_are_never_loaded(spoiled):
    first, second = (spoiled / name for name in SHARDS)
    first.rename(spoiled / "kept")
    second.rename(first)
    (spoiled / "kept").rename(second)
    require_refused(spoiled, SHARDS[0])


@pytest.mark.parametrize("name", SHARDS)
def test_a_shard_of_another_checkpoint_of_the_same_step_is_never_loaded(twins, spoiled, name):
    assert (twins[1] / name).stat().st_size == (spoiled / name).stat().st_size
    shutil.copy(twins[1] / name, spoiled / name)
    require_refused(spoiled, name)


def test_the_manifest_of_another_checkpoint_of_the_same_step_is_never_loaded(twins, spoiled):
    shutil.copy(twins[1] / "manifest.json", spoiled / "manifest.json")
    require_refused(spoiled, ".metadata")


def test_every_bit_of_a_file_is_looked_at(spoiled):
    """Flips one bit at places drawn over all files, one at a time."""
    generator = random.Random(5)
    for _ in range(60):
        name = generator.choice([*SHARDS, ".metadata"])
        content = (spoiled / name).read_bytes()
        changed = bytearray(content)
        changed[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        (spoiled / name).write_bytes(changed)
        with pytest.raises(DataError, match="is damaged: its checksum has changed") as caught:
            load_whole(spoiled, "model.")
        assert str(spoiled / name) in caught.value.message
        (spoiled / name).write_bytes(content)


def test_ranks_fail_together_whoever_has_found_it(spoiled):
    """Checksums are shared out: each file is read for it by one rank alone."""
    plan = Plan(mesh=MeshConfig(dp_shard=2))
    for name in SHARDS:
        content = (spoiled / name).read_bytes()
        (spoiled / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))

        def work(rank: int) -> str:
            state, world = state_of(plan, rank, 5)
            with pytest.raises(DataError) as caught:
                load(spoiled, state.parts(), world)
            return caught.value.message

        messages = run_ranks(work, 2)
        assert messages[0] == messages[1]
        assert f"{spoiled / name} is damaged" in messages[0]
        (spoiled / name).write_bytes(content)


def test_ranks_share_out_the_checksums(spoiled, monkeypatch):
    from paceline.checkpoint import manifest as module

    read: list[str] = []
    original = module.sha256
    monkeypatch.setattr(module, "sha256", lambda path: read.append(path.name) or original(path))
    manifest = read_manifest(spoiled)
    for rank in range(4):
        verify_files(spoiled, manifest, rank, 4)
    assert sorted(read) == sorted(manifest.files)
