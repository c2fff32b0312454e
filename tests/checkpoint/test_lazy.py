"""Lazy saves: what is on disk is the state at the fence's step, whatever happens around it."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from paceline.checkpoint import SAVERS, shares
from paceline.checkpoint.base import LostSaveRecord, SavedRun, Saver, SaveRecord, Told
from paceline.checkpoint.lazy import LazySaver
from paceline.checkpoint.levels import candidates, level_folder, memory_folder
from paceline.checkpoint.load import load as load_checkpoint
from paceline.checkpoint.manifest import complete_checkpoints, read_manifest, verify_files
from paceline.checkpoint.save import save as save_blocking
from paceline.core.errors import PacelineError, UsageError
from paceline.dist.testing import run_ranks
from paceline.dist.world import World
from paceline.models.families.llama import PRESETS
from paceline.optim.parts import Part
from paceline.plan.layout import Place
from paceline.plan.mesh import MeshConfig
from paceline.plan.plan import CheckpointConfig, Plan

pytestmark = pytest.mark.cpu

SPEC = PRESETS["tiny"]
ALONE = World(MeshConfig(), 0, torch.device("cpu"))
NAMES = [f"model.{n}" for n in range(6)]


def parts_of(world: World = ALONE, value: float = 0.0) -> dict[str, Part]:
    """Tensors spread by rows over the ranks, and a counter that every rank has."""
    ranks = world.mesh.num_ranks
    parts = {}
    for number, name in enumerate(NAMES):
        rows = 4 * (number + 1)
        place = Place.of_whole((rows * ranks, 9)).rows(
            range(rows * world.rank, rows * (world.rank + 1))
        )
        parts[name] = Part(torch.full((rows, 9), value), place)
    return parts | {"optimizer.count": Part.of_whole(torch.tensor(value))}


def run_of(folder: Path, world: World = ALONE, **config: Any) -> SavedRun:
    folder.mkdir(exist_ok=True)
    plan = Plan(mesh=world.mesh, checkpoint=CheckpointConfig(**config))
    return SavedRun(folder, plan, SPEC, world)


def set_all(parts: dict[str, Part], value: float) -> None:
    for part in parts.values():
        part.tensor.fill_(value)


def save_one(saver: Saver, step: int, parts: dict[str, Part]) -> list[Told]:
    """Saves a step and waits until all is on disk."""
    saver.begin(step, parts)
    saver.fence()
    return saver.finish()


def value_of(checkpoint: Path, world: World = ALONE) -> tuple[int, float]:
    """The step of a checkpoint and the one value that all its elements have."""
    whole = {
        name: Part.of_whole(torch.zeros(entry.shape))
        for name, entry in read_manifest(checkpoint).tensors.items()
    }
    manifest = load_checkpoint(checkpoint, whole, world)
    (value,) = {v for part in whole.values() for v in part.tensor.unique().tolist()}
    return manifest.step, value


@pytest.mark.parametrize("method", SAVERS)
def test_a_method_saves_what_the_other_saves(make_state, tmp_path, method):
    plan = Plan(checkpoint=CheckpointConfig(method=method))
    state, world = make_state(plan)
    saver = SAVERS.load(method)(SavedRun(tmp_path, plan, SPEC, world), state.parts())
    saver.begin(1, state.parts())
    saver.fence()
    (told,) = saver.finish()
    saver.close()
    ours = level_folder(tmp_path, "disk") / "step-1"
    plain = save_blocking(tmp_path / "plain", 1, state.parts(), plan, SPEC, world)
    assert isinstance(told, SaveRecord)
    assert (told.step, told.path, told.level) == (1, str(ours), "disk")
    assert told.size_bytes == read_manifest(ours).size_bytes
    assert told.write_s > 0
    assert 0 <= told.stall_s <= told.time_s
    mine, theirs = read_manifest(ours), read_manifest(plain)
    assert mine.tensors == theirs.tensors
    assert mine.files.keys() == theirs.files.keys()
    assert {path.name for path in ours.iterdir()} == {*mine.files, "manifest.json"}
    data = "__0_0.distcp"
    assert (ours / data).read_bytes() == (plain / data).read_bytes()
    assert [path.name for path in ours.parent.iterdir()] == ["step-1"]


def with_delays(monkeypatch: pytest.MonkeyPatch, generator: random.Random) -> None:
    """Holds up copies, takes and syncs at random."""
    import os

    from paceline.checkpoint.staging import StagedTensors
    from paceline.kernels.device import HostCopies

    def late(original: Any) -> Any:
        def call(*arguments: Any) -> Any:
            if generator.random() < 0.3:
                time.sleep(generator.uniform(0, 0.004))
            return original(*arguments)

        return call

    monkeypatch.setattr(HostCopies, "copy", late(HostCopies.copy))
    monkeypatch.setattr(StagedTensors, "take", late(StagedTensors.take))
    monkeypatch.setattr(os, "fsync", late(os.fsync))


@pytest.mark.parametrize("buffer_bytes", [0, 1000, 2000])
def test_an_optimizer_that_scribbles_right_after_the_fence_changes_nothing(
    tmp_path, monkeypatch, buffer_bytes
):
    with_delays(monkeypatch, random.Random(buffer_bytes))
    run = run_of(tmp_path, buffer_bytes=buffer_bytes, keep=3)
    parts = parts_of()
    saver = LazySaver(run, parts)
    for step in range(1, 68):
        set_all(parts, step)
        saver.begin(step, parts)
        saver.fence()
        set_all(parts, -1.0)
        saver.poll()
        if step > 3:
            newest = complete_checkpoints(level_folder(tmp_path, "disk"))[-1]
            assert value_of(newest) in ((step, step), (step - 1, step - 1))
    told = saver.finish()
    assert told[-1].step == 67
    complete = complete_checkpoints(level_folder(tmp_path, "disk"))
    assert [value_of(path) for path in complete] == [(n, n) for n in (65, 66, 67)]
    assert saver._staging.size_bytes <= (buffer_bytes or 1 << 30)


def test_the_trainer_waits_for_no_more_than_the_copies(tmp_path, monkeypatch):
    """Syncs that take long hold up the next save, and nothing before it."""
    import os

    fsync = os.fsync

    def slow(handle: int) -> None:
        time.sleep(0.1)
        fsync(handle)

    parts = parts_of()
    saver = LazySaver(run_of(tmp_path), parts)
    monkeypatch.setattr(os, "fsync", slow)
    start_s = time.perf_counter()
    saver.begin(1, parts)
    saver.fence()
    assert time.perf_counter() - start_s < 0.1
    assert saver.poll() == []
    saver.begin(2, parts)
    assert time.perf_counter() - start_s > 0.3
    first, second = saver.finish()
    assert isinstance(first, SaveRecord)
    assert isinstance(second, SaveRecord)
    assert first.time_s < 0.1 < 0.3 < first.write_s
    assert 0.2 < second.stall_s <= second.time_s


@pytest.mark.ranks
@pytest.mark.parametrize("buffer_bytes", [0, 1500])
def test_ranks_save_together(tmp_path, buffer_bytes):
    def work(rank: int) -> list[int]:
        world = World(MeshConfig(dp_shard=2), rank, torch.device("cpu"))
        parts = parts_of(world)
        saver = LazySaver(run_of(tmp_path, world, buffer_bytes=buffer_bytes), parts)
        told = []
        for step in range(1, 6):
            set_all(parts, step)
            saver.begin(step, parts)
            if rank == 1:
                time.sleep(0.02)
            saver.fence()
            set_all(parts, -1.0)
            told += saver.poll()
        told += saver.finish()
        saver.close()
        return [(record.step, record.size_bytes) for record in told]

    ours, theirs = run_ranks(work, 2, timeout_s=30)
    assert ours == theirs
    assert [step for step, _ in ours] == [1, 2, 3, 4, 5]
    complete = complete_checkpoints(level_folder(tmp_path, "disk"))
    assert [value_of(path) for path in complete] == [(n, n) for n in range(1, 6)]
    assert read_manifest(complete[0]).tensors["model.0"].shape == (8, 9)
    assert {path.name for path in complete[0].iterdir()} == {
        "__0_0.distcp", "__1_0.distcp", ".metadata", "manifest.json",
    }  # fmt: skip


@pytest.mark.ranks
@pytest.mark.parametrize("on_error", ["stop", "continue"])
def test_copies_that_differ_end_the_run_whatever_it_does_about_disks(tmp_path, on_error):
    def run(rank: int) -> str:
        world = World(MeshConfig(dp_replicate=2), rank, torch.device("cpu"))
        count = torch.tensor(1.0 + rank * 2**-23)
        parts = parts_of(world, 1.0) | {"optimizer.count": Part.of_whole(count)}
        saved = run_of(tmp_path, world, method="lazy", on_error=on_error)
        saver = LazySaver(saved, parts)
        saver.begin(1, parts)
        saver.fence()
        try:
            saver.finish()
        except Exception as error:  # one rank may see no more than that it has lost the other
            return str(error)
        finally:
            saver.close()
        return "saved"

    first, second = run_ranks(run, 2)
    assert first.startswith("optimizer.count: rank(s) 0 and rank(s) 1 hold different bits")
    assert second != "saved"
    assert complete_checkpoints(tmp_path / "checkpoints") == []


@pytest.mark.ranks
def test_a_checkpoint_is_visible_once_every_rank_is_on_disk(tmp_path):
    def work(rank: int) -> bool:
        world = World(MeshConfig(dp_shard=2), rank, torch.device("cpu"))
        parts = parts_of(world)
        saver = LazySaver(run_of(tmp_path, world), parts)
        if rank == 1:
            write_share = shares.SaveFiles.write_share

            def late(files: Any, staged: Any, copies: Any) -> None:
                time.sleep(0.5)
                write_share(files, staged, copies)

            shares.SaveFiles.write_share = late
        saver.begin(1, parts)
        saver.fence()
        time.sleep(0.25)
        visible = (level_folder(tmp_path, "disk") / "step-1").exists()
        saver.finish()
        return visible

    assert run_ranks(work, 2, timeout_s=30) == [False, False]
    assert value_of(level_folder(tmp_path, "disk") / "step-1") == (1, 0.0)


# Levels


@pytest.mark.parametrize("method", SAVERS)
def test_slower_levels_are_filled_and_memory_is_left_empty(tmp_path, method):
    far = str(tmp_path / "far")
    run = run_of(tmp_path / "run", levels=("memory", "disk", far), method=method, keep=2)
    parts = parts_of()
    saver = SAVERS.load(method)(run, parts)
    told = []
    try:
        for step in range(1, 5):
            set_all(parts, step)
            saver.begin(step, parts)
            saver.fence()
            told += saver.poll()
            assert candidates(run.folder, ("memory",)) or step == 1
        told += saver.finish()
        assert not memory_folder(run.folder).exists()
    finally:
        saver.close()
        saver._levels.drop_memory()
    for level in ("disk", far):
        assert [r.step for r in told if r.level == level][-1] == 4
        complete = complete_checkpoints(level_folder(run.folder, level))
        assert value_of(complete[-1]) == (4, 4.0)
        assert len(complete) <= 2
    assert [r.step for r in told if r.level == "memory"] == [1, 2, 3, 4]


@pytest.mark.ranks
def test_memory_that_machines_do_not_share_is_refused(tmp_path):
    def work(rank: int) -> str:
        import platform

        name = f"machine-{rank}"
        platform.node = lambda: name
        world = World(MeshConfig(dp_shard=2), rank, torch.device("cpu"))
        with pytest.raises(UsageError) as caught:
            LazySaver(run_of(tmp_path, world, levels=("memory", "disk")), parts_of(world))
        return str(caught.value)

    found = run_ranks(work, 2, timeout_s=30)
    assert 'checkpoint.levels has "memory", but the ranks are on machine-0, machine-1' in found[1]


@pytest.mark.parametrize(("keep", "every", "left"), [(2, 0, [6, 7]), (2, 3, [3, 6, 7]), (0, 3, 7)])
def test_the_newest_and_every_nth_are_kept(tmp_path, keep, every, left):
    parts = parts_of()
    saver = LazySaver(run_of(tmp_path, keep=keep, keep_every=every), parts)
    for step in range(1, 8):
        saver.begin(step, parts)
        saver.fence()
    saver.finish()
    steps = left if isinstance(left, list) else list(range(1, left + 1))
    complete = complete_checkpoints(level_folder(tmp_path, "disk"))
    assert [path.name for path in complete] == [f"step-{n}" for n in steps]


# Faults of disks


def failing_fsync(monkeypatch: pytest.MonkeyPatch, calls: set[int]) -> None:
    """Fails the n-th syncs from now on, as a full disk does."""
    import errno
    import os

    fsync, count, lock = os.fsync, 0, threading.Lock()

    def call(handle: int) -> None:
        nonlocal count
        with lock:
            count += 1
            number = count
        if number in calls:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", call)


@pytest.mark.parametrize("method", SAVERS)
@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_disk_that_fills_stops_the_run_with_one_clear_error(
    tmp_path, monkeypatch, method, number
):
    parts = parts_of(value=1.0)
    saver = SAVERS.load(method)(run_of(tmp_path), parts)
    saver.begin(1, parts)
    saver.finish()
    failing_fsync(monkeypatch, {number})
    with pytest.raises(PacelineError, match=r"step-2 cannot be written: .*No space left") as caught:
        save_one(saver, 2, parts)
    assert "is there space?" in caught.value.hint
    saver.close()
    complete = complete_checkpoints(level_folder(tmp_path, "disk"))
    assert [value_of(path) for path in complete] == [(1, 1.0)]


@pytest.mark.parametrize("method", SAVERS)
def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch, method):
    import errno
    import os

    def refuse(*_arguments: Any, **_options: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    parts = parts_of(value=1.0)
    saver = SAVERS.load(method)(run_of(tmp_path), parts)
    save_one(saver, 1, parts)
    with monkeypatch.context() as patch:
        patch.setattr(os, "mkdir", refuse)
        with pytest.raises(PacelineError, match=r"step-2 cannot be written: .*Read-only"):
            saver.begin(2, parts)
    saver.close()
    assert value_of(level_folder(tmp_path, "disk") / "step-1") == (1, 1.0)


@pytest.mark.parametrize("method", SAVERS)
def test_a_folder_that_vanishes_in_the_middle_of_a_save_is_named(tmp_path, monkeypatch, method):
    import os
    import shutil

    folder, fsync = level_folder(tmp_path, "disk"), os.fsync

    def vanish(handle: int) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        fsync(handle)

    parts = parts_of()
    saver = SAVERS.load(method)(run_of(tmp_path), parts)
    monkeypatch.setattr(os, "fsync", vanish)
    with pytest.raises(PacelineError, match=r"step-1 cannot be written: .*No such file"):
        save_one(saver, 1, parts)
    saver.close()


@pytest.mark.parametrize("method", SAVERS)
def test_a_run_that_may_go_on_does_so_without_the_save(tmp_path, monkeypatch, method):
    parts = parts_of(value=1.0)
    saver = SAVERS.load(method)(run_of(tmp_path, on_error="continue"), parts)
    failing_fsync(monkeypatch, {1})
    told = []
    for step in (1, 2):
        saver.begin(step, parts)
        saver.fence()
        told += saver.poll()
    told += saver.finish()
    lost, kept = told
    assert isinstance(lost, LostSaveRecord)
    assert (lost.step, lost.level) == (1, "disk")
    assert "No space left" in lost.why
    assert kept.step == 2
    assert {path.name for path in level_folder(tmp_path, "disk").iterdir()} == {"step-2"}


@pytest.mark.ranks
@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("method", SAVERS)
def test_ranks_lose_a_save_together(tmp_path, failing, method):
    def work(rank: int) -> list[tuple[str, int]]:
        world = World(MeshConfig(dp_shard=2), rank, torch.device("cpu"))
        parts = parts_of(world, 1.0)
        run = run_of(tmp_path, world, on_error="continue", method=method)
        saver = SAVERS.load(method)(run, parts)
        told = []
        with pytest.MonkeyPatch.context() as patch:
            for step in (1, 2, 3):
                if step == 2:
                    told += saver.finish()  # no sync of the first save is left
                if rank == failing and step == 2:
                    failing_fsync(patch, {1})
                saver.begin(step, parts)
                saver.fence()
                told += saver.poll()
            told += saver.finish()
        saver.close()
        return [(record.kind, record.step) for record in told]

    ours, theirs = run_ranks(work, 2, timeout_s=30)
    assert ours == theirs == [("save", 1), ("lost-save", 2), ("save", 3)]
    names = {path.name for path in level_folder(tmp_path, "disk").iterdir()}
    assert names == {"step-1", "step-3"}


@pytest.mark.parametrize("method", SAVERS)
def test_a_run_folder_that_vanishes_is_named(tmp_path, method):
    import shutil

    parts = parts_of()
    run = run_of(tmp_path / "run", method=method)
    saver = SAVERS.load(method)(run, parts)
    saver.begin(1, parts)
    saver.fence()
    saver.finish()
    shutil.rmtree(run.folder)
    with pytest.raises(PacelineError, match=r"run has vanished"):
        saver.begin(2, parts)
    assert not run.folder.exists()


def test_a_shard_that_changes_before_it_is_copied_is_noticed(tmp_path):
    from paceline.checkpoint.fill import copy_checkpoint

    source = save_blocking(tmp_path / "a", 1, parts_of(value=1.0), Plan(), SPEC, ALONE)
    data = bytearray((source / "__0_0.distcp").read_bytes())
    data[len(data) // 2] ^= 1
    (source / "__0_0.distcp").write_bytes(data)
    with pytest.raises(PacelineError, match=r"__0_0\.distcp is damaged"):
        copy_checkpoint(source, tmp_path / "b")
    assert complete_checkpoints(tmp_path / "b") == []


def test_a_copy_is_the_same_files(tmp_path):
    from paceline.checkpoint.fill import copy_checkpoint

    source = save_blocking(tmp_path / "a", 1, parts_of(value=1.0), Plan(), SPEC, ALONE)
    copy = copy_checkpoint(source, tmp_path / "b")
    verify_files(copy, read_manifest(copy))
    assert {p.name: p.read_bytes() for p in copy.iterdir()} == {
        p.name: p.read_bytes() for p in source.iterdir()
    }
