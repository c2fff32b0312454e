from __future__ import annotations

import dataclasses
import json
import os
import random
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from paceline.checkpoint.load import load as load_checkpoint
from paceline.checkpoint.load import load_whole
from paceline.checkpoint.manifest import complete_checkpoints, newest_checkpoint, read_manifest
from paceline.checkpoint.save import save as save_checkpoint
from paceline.core.errors import DataError, PacelineError, RankError, UsageError
from paceline.dist.testing import run_ranks
from paceline.dist.world import World
from paceline.models.families.llama import PRESETS
from paceline.optim.parts import Part
from paceline.plan.layout import Place
from paceline.plan.mesh import MeshConfig
from paceline.plan.plan import CheckpointConfig, OptimizerConfig, Plan, TrainConfig, ZeroConfig
from wholes import whole_weights

pytestmark = pytest.mark.cpu

SPEC = PRESETS["tiny"]
ALONE = World(MeshConfig(), 0, torch.device("cpu"))
ZEROS = {
    "stage 1": ZeroConfig(stage=1),
    "stage 2": ZeroConfig(stage=2),
    "own stage 3": ZeroConfig(stage=3, sharder="own"),
}
LAYOUTS = {
    "one rank": Plan(),
    "one rank, sgd, frozen": Plan(
        optimizer=OptimizerConfig(name="sgd"), train=TrainConfig(freeze=("blocks.1.ffn.*",))
    ),
    "dp_shard 2": Plan(mesh=MeshConfig(dp_shard=2)),
    "dp_shard 3, frozen": Plan(
        mesh=MeshConfig(dp_shard=3), train=TrainConfig(freeze=("embedding.*",))
    ),
    "dp_replicate 2": Plan(mesh=MeshConfig(dp_replicate=2)),
    "dp_replicate 2 x dp_shard 2": Plan(mesh=MeshConfig(dp_replicate=2, dp_shard=2)),
    **{
        f"dp_shard 3, frozen, {stage}": Plan(
            mesh=MeshConfig(dp_shard=3), zero=zero, train=TrainConfig(freeze=("embedding.*",))
        )
        for stage, zero in ZEROS.items()
    },
}


def copies(parts: dict[str, Part]) -> dict[str, torch.Tensor]:
    return {name: part.local.clone() for name, part in parts.items()}


def whole(tensors: dict[str, torch.Tensor]) -> dict[str, Part]:
    return {name: Part.of_whole(tensor) for name, tensor in tensors.items()}


def logits(state: Any) -> torch.Tensor:
    with torch.no_grad():
        return state.model.module(torch.arange(12).view(2, 6))


def save(folder: Path, step: int, value: float, *, keep: int = 0, world: World = ALONE) -> Path:
    """Saves two small tensors that are full of `value`."""
    value = float(value)
    tensors = {"model.a": torch.full((64, 3), value), "optimizer.a.step": torch.tensor(value)}
    plan = Plan(checkpoint=CheckpointConfig(keep=keep))
    return save_checkpoint(folder, step, whole(tensors), plan, SPEC, world)


def load(checkpoint: Path) -> tuple[int, float]:
    """The step and the value of a checkpoint that `save` has made."""
    tensors = {"model.a": torch.zeros(64, 3), "optimizer.a.step": torch.tensor(0.0)}
    manifest = load_checkpoint(checkpoint, whole(tensors), ALONE)
    (value,) = tensors["model.a"].unique().tolist()
    assert tensors["optimizer.a.step"].item() == value
    return manifest.step, value


@pytest.mark.ranks
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_loaded_has_the_bits_that_were_saved(make_state, tmp_path, layout):
    plan = LAYOUTS[layout]

    def work(rank: int) -> dict[str, Any]:
        state, world = make_state(plan, rank)
        saved = copies(state.parts())
        path = save_checkpoint(tmp_path, 2, state.parts(), plan, SPEC, world)
        other, _ = make_state(plan, rank, seed=1, num_steps=1)
        before = copies(other.parts())
        manifest = load_checkpoint(path, other.parts(), world)
        after = copies(other.parts())
        # The live state, not a copy of it.
        other.model.data.finish_update(other.model.module)
        assert torch.equal(logits(other), logits(state))
        return {
            "step": manifest.step,
            "loaded": [name for name, value in saved.items() if torch.equal(value, after[name])],
            "before": [name for name, value in saved.items() if torch.equal(value, before[name])],
            "names": list(saved),
        }

    found = [work(0)] if plan.mesh.num_ranks == 1 else run_ranks(work, plan.mesh.num_ranks)
    for result in found:
        assert result["step"] == 2
        assert result["loaded"] == result["names"]
        assert result["before"] == []
        assert any(name.startswith("optimizer.") for name in result["names"])
    manifest = read_manifest(tmp_path / "step-2")
    assert sorted(manifest.tensors) == sorted(found[0]["names"])


@pytest.mark.ranks
@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_process_reads_whole_tensors_of_any_layout(make_state, tmp_path, layout):
    plan = LAYOUTS[layout]

    def work(rank: int) -> dict[str, Any]:
        state, world = make_state(plan, rank)
        save_checkpoint(tmp_path, 1, state.parts(), plan, SPEC, world)
        return {f"model.{n}": value for n, value in whole_weights(state.model.parts, world).items()}

    expected = work(0) if plan.mesh.num_ranks == 1 else run_ranks(work, plan.mesh.num_ranks)[0]
    found = load_whole(tmp_path / "step-1", "model.")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], torch.from_numpy(value)), name


def test_a_manifest_says_what_a_checkpoint_holds(make_state, tmp_path):
    plan = Plan(train=TrainConfig(seed=9))
    state, world = make_state(plan)
    manifest = read_manifest(save_checkpoint(tmp_path, 7, state.parts(), plan, SPEC, world))
    assert manifest.step == 7
    assert Plan.from_dict(manifest.plan) == plan
    assert type(SPEC).from_dict(manifest.model) == SPEC
    assert manifest.versions.keys() == {"paceline", "torch"}
    entry = manifest.tensors["model.embedding.weight"]
    assert (entry.shape, entry.dtype) == ((259, 48), "float32")
    on_disk = {path.name for path in (tmp_path / "step-7").iterdir()}
    assert on_disk == {*manifest.files, "manifest.json"}
    assert sum(e.size_bytes for e in manifest.files.values()) > 3 * 4 * SPEC.num_parameters


# Retention and overwriting


@pytest.mark.parametrize(("keep", "kept"), [(0, [1, 2, 5, 9, 10]), (1, [10]), (2, [9, 10])])
def test_the_newest_are_kept(tmp_path, keep, kept):
    for step in (1, 2, 5, 9, 10):  # 10 is newer than 9 and than 2
        save(tmp_path, step, step, keep=keep)
    assert [path.name for path in complete_checkpoints(tmp_path)] == [f"step-{n}" for n in kept]
    assert {path.name for path in tmp_path.iterdir()} == {f"step-{n}" for n in kept}
    assert [load(path) for path in complete_checkpoints(tmp_path)] == [(n, n) for n in kept]


def test_a_step_can_be_saved_again(tmp_path):
    save(tmp_path, 3, 1.0)
    (tmp_path / "step-3" / "stray").touch()
    save(tmp_path, 3, 2.0)
    assert load(tmp_path / "step-3") == (3, 2.0)
    assert [path.name for path in tmp_path.iterdir()] == ["step-3"]
    assert not (tmp_path / "step-3" / "stray").exists()


def test_what_a_kill_has_left_is_replaced_and_swept(tmp_path):
    save(tmp_path, 1, 1.0)
    (tmp_path / "step-2").mkdir()
    (tmp_path / "step-2" / "__0_0.distcp").write_bytes(b"half")
    (tmp_path / ".retired-step-0").mkdir()
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step-1"]
    save(tmp_path, 2, 2.0)
    assert load(tmp_path / "step-2") == (2, 2.0)
    assert {path.name for path in tmp_path.iterdir()} == {"step-1", "step-2"}


def test_a_path_means_the_newest_complete_checkpoint(tmp_path):
    run = tmp_path / "run"
    for path in (run, run / "checkpoints", tmp_path / "nowhere"):
        with pytest.raises(UsageError, match="holds no complete checkpoint") as caught:
            newest_checkpoint(path)
        assert "checkpoints/step-N" in caught.value.hint
    for step in (9, 10, 2):
        save(run / "checkpoints", step, step)
    (run / "checkpoints" / "step-11").mkdir()
    (run / "checkpoints" / "step-x").mkdir()
    assert newest_checkpoint(run) == run / "checkpoints" / "step-10"
    assert newest_checkpoint(run / "checkpoints" / "step-9") == run / "checkpoints" / "step-9"


# Damage


@pytest.fixture
def damaged(tmp_path) -> Path:
    """A complete checkpoint to spoil."""
    return save(tmp_path, 4, 4.0)


FILES = (".metadata", "__0_0.distcp", "manifest.json")


def assert_named(checkpoint: Path, name: str) -> None:
    for read in (load, lambda path: load_whole(path, "model.")):
        with pytest.raises(DataError) as caught:
            read(checkpoint)
        assert str(checkpoint / name) in caught.value.message
        assert caught.value.hint == "the checkpoint is damaged: resume from an older one"


def test_these_are_all_files(damaged):
    assert sorted(path.name for path in damaged.iterdir()) == sorted(FILES)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
def test_a_truncated_file_is_named(damaged, name, share):
    size_bytes = (damaged / name).stat().st_size
    os.truncate(damaged / name, int(size_bytes * share))
    assert_named(damaged, name)


@pytest.mark.parametrize("name", FILES[:2])
def test_a_missing_file_is_named(damaged, name):
    (damaged / name).unlink()
    assert_named(damaged, name)


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_named_wherever_it_is(damaged, name):
    path = damaged / name
    content = path.read_bytes()
    generator = random.Random(name)
    places = [0, len(content) - 1, *(generator.randrange(len(content)) for _ in range(40))]
    for place in places:
        spoiled = bytearray(content)
        spoiled[place] ^= 1 << generator.randrange(8)
        if name == "manifest.json" and is_same_json(bytes(spoiled), content):
            continue  # white space became other white space
        path.write_bytes(spoiled)
        assert_named(damaged, name)
    path.write_bytes(content)
    assert load(damaged) == (4, 4.0)


def is_same_json(spoiled: bytes, content: bytes) -> bool:
    try:
        return json.loads(spoiled) == json.loads(content)
    except ValueError:
        return False


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        "null",
        '"text"',
        '{"format": 1}',
        '{"step": 4, "files": {}, "tensors": {}}',
        '{"weight_map": {"a": "model.safetensors"}}',
        "\x00\x01",
    ],
)
def test_a_foreign_manifest_is_named(damaged, text):
    (damaged / "manifest.json").write_text(text)
    assert_named(damaged, "manifest.json")


def test_another_format_is_refused_by_its_number(damaged):
    manifest = read_manifest(damaged)
    dataclasses.replace(manifest, format=99).commit(damaged)
    with pytest.raises(UsageError, match=r"manifest\.json: format 99, this version reads 1"):
        load(damaged)


def test_a_manifest_that_is_not_text_is_named(damaged):
    (damaged / "manifest.json").write_bytes(b"\xff\xfe{}")
    assert_named(damaged, "manifest.json")


def test_files_of_another_checkpoint_are_noticed(tmp_path):
    first, second = save(tmp_path, 1, 1.0), save(tmp_path, 2, 2.0)
    shutil.copy(first / "__0_0.distcp", second / "__0_0.distcp")  # of the same size
    assert_named(second, "__0_0.distcp")


def test_a_checkpoint_of_another_model_is_refused(damaged):
    wanted = {"model.a": torch.zeros(64, 3), "optimizer.a.step": torch.tensor(0.0)}
    for tensors, why in (
        (wanted | {"model.b": torch.zeros(1)}, "only this run has the tensor model.b"),
        ({"model.a": wanted["model.a"]}, "only the checkpoint has the tensor optimizer.a.step"),
        (wanted | {"model.a": torch.zeros(3, 64)}, r"model.a has shape \(64, 3\), this run wants"),
    ):
        with pytest.raises(DataError, match=why) as caught:
            load_checkpoint(damaged, whole(tensors), ALONE)
        assert str(damaged) in caught.value.message
        assert not any(value.any() for value in tensors.values())


@pytest.mark.ranks
def test_damage_is_an_error_on_ranks_too(damaged):
    content = bytearray((damaged / "__0_0.distcp").read_bytes())
    content[100] ^= 1
    (damaged / "__0_0.distcp").write_bytes(content)

    def work(rank: int) -> None:
        world = World(MeshConfig(dp_replicate=2), rank, torch.device("cpu"))
        load_checkpoint(damaged, whole({"model.a": torch.zeros(64, 3)}), world)

    with pytest.raises(RankError, match=r"rank [01] failed(.|\n)*__0_0.distcp is damaged"):
        run_ranks(work, 2)


@pytest.mark.ranks
def test_a_disk_that_is_full_is_one_clear_error(tmp_path):
    def work(_rank: int) -> tuple[str, str]:
        save(tmp_path, 1, 1.0)
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        with pytest.raises(PacelineError) as caught:
            save(tmp_path, 2, 2.0)
        return caught.value.message, caught.value.hint

    ((message, hint),) = run_ranks(work, 1)
    assert message.startswith(f"{tmp_path / 'step-2'} cannot be written: ")
    assert "File too large" in message
    assert "Traceback" not in message
    assert "is there space?" in hint
    assert newest_of(tmp_path) == (1, 1.0)


def test_an_interrupt_in_a_save_is_an_interrupt(tmp_path, monkeypatch):
    def interrupted(_handle: int) -> None:
        raise KeyboardInterrupt

    save(tmp_path, 1, 1.0)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", interrupted)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 2, 2.0)
    assert newest_of(tmp_path) == (1, 1.0)


def newest_of(folder: Path) -> tuple[int, float]:
    return load(complete_checkpoints(folder)[-1])


# Kills

CALLS = ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir")
"""What a save changes on disk goes through these, or lies between two of them."""


def die_at_call(number: int) -> None:
    """Kills this process before the n-th of the calls from now on; 0 for never."""
    count = 0

    def counted(original: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **options)

        return call

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))


@pytest.mark.ranks
def test_a_kill_before_any_change_of_the_disk_leaves_a_checkpoint(tmp_path):
    """Saves step 3 beside 1 and 2, of which one is to go, and dies at every point in turn."""
    before, number = [(1, 1.0), (2, 2.0)], 0
    outcomes = []
    while True:
        number += 1
        folder = tmp_path / str(number)
        for step, value in before:
            save(folder, step, value)

        def work(_rank: int, folder: Path = folder, number: int = number) -> None:
            die_at_call(number)
            save(folder, 3, 3.0, keep=2)

        try:
            run_ranks(work, 1)
        except RankError as error:
            assert "died with exit code -9" in str(error)  # noqa: PT017
        else:
            break
        outcomes.append(newest_of(folder))
        assert outcomes[-1] in ((2, 2.0), (3, 3.0))
        assert all(load(path)[0] in (1, 2, 3) for path in complete_checkpoints(folder))
        # The next run takes up from there: it saves the same step, and nothing is left over.
        save(folder, 3, 3.5, keep=2)
        assert {path.name for path in folder.iterdir()} == {"step-2", "step-3"}
        assert newest_of(folder) == (3, 3.5)
    assert len(outcomes) >= 10
    assert outcomes == sorted(outcomes)  # committed once, and for good
    assert set(outcomes) == {(2, 2.0), (3, 3.0)}


@pytest.mark.ranks
@pytest.mark.parametrize("dying", [0, 1])
def test_a_rank_that_is_killed_leaves_a_checkpoint(tmp_path, dying):
    outcomes = []
    for number in (1, 2, 3, 5, 8):
        folder = tmp_path / str(number)
        save(folder, 1, 1.0)

        def work(rank: int, folder: Path = folder, number: int = number) -> None:
            world = World(MeshConfig(dp_shard=2), rank, torch.device("cpu"))
            place = Place.of_whole((64, 3)).rows(range(32 * rank, 32 * rank + 32))
            parts = whole({"optimizer.a.step": torch.tensor(2.0)})
            parts["model.a"] = Part(torch.full((32, 3), 2.0), place)
            if rank == dying:
                die_at_call(number)
            save_checkpoint(folder, 2, parts, Plan(), SPEC, world)

        try:
            run_ranks(work, 2)
        except RankError as error:
            assert f"rank {dying} died with exit code -9" in str(error)  # noqa: PT017
            outcomes.append(newest_of(folder))
    assert (1, 1.0) in outcomes
    assert set(outcomes) <= {(1, 1.0), (2, 2.0)}


@pytest.mark.ranks
def test_kills_at_random_moments_leave_the_newest_checkpoint(tmp_path):
    """Saves without end, keeping two, is killed 20 times, and always goes on from the newest."""
    generator = random.Random(17)
    folder, told = tmp_path / "checkpoints", tmp_path / "told"
    told.write_text("0")
    for _ in range(20):
        delay_s = generator.uniform(0.001, 0.2)

        def work(_rank: int, delay_s: float = delay_s) -> None:
            signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
            complete = complete_checkpoints(folder)
            step = load(complete[-1])[0] if complete else 0
            while True:
                step += 1
                save(folder, step, 10.0 * step, keep=2)
                told.write_text(str(step))
                if signal.getitimer(signal.ITIMER_REAL)[0] == 0.0:
                    signal.setitimer(signal.ITIMER_REAL, delay_s)

        with pytest.raises(RankError, match="died with exit code -9"):
            run_ranks(work, 1)
        complete = [load(path) for path in complete_checkpoints(folder)]
        assert all(value == 10.0 * step for step, value in complete)
        if said := int(told.read_text() or 0):
            assert complete[-1][0] in (said, said + 1)
            assert len(complete) in (1, 2, 3)
    assert int(told.read_text() or 0) >= 20
