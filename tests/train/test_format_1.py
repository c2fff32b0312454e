"""A run folder that the release before has written goes on as it was going.

It was trained by two ranks under ZeRO stage 1: its records hold the losses of steps 1 to 6, its
checkpoint is of step 3 and of manifest format 1.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from paceline.checkpoint.export import export
from paceline.checkpoint.manifest import read_manifest, verify_files
from paceline.cli.main import main
from paceline.core.record import read_records
from paceline.dist.testing import run_ranks
from paceline.dist.world import World
from paceline.models.hub import resolve
from paceline.plan.mesh import MeshConfig
from paceline.plan.plan import ZeroConfig
from paceline.train.run import RunFolder
from paceline.train.trainer import Trainer

pytestmark = [pytest.mark.cpu, pytest.mark.ranks]

FIXTURE = Path(__file__).parent.parent / "checkpoint" / "fixtures" / "format-1"
LAYOUTS = {
    "one rank": (MeshConfig(), ZeroConfig()),
    "as it was": (MeshConfig(dp_shard=2), ZeroConfig(stage=1)),
    "tp 2": (MeshConfig(tp=2), ZeroConfig()),
    "pp 2": (MeshConfig(pp=2), ZeroConfig()),
    "stage 3": (MeshConfig(dp_shard=2), ZeroConfig()),
}


@pytest.fixture
def run(tmp_path) -> RunFolder:
    """A copy, with its data beside it."""
    folder = tmp_path / "run"
    shutil.copytree(FIXTURE, folder)
    config = (folder / "run.toml").read_text()
    assert "/tmp/fx/words.txt" in config
    (folder / "run.toml").write_text(config.replace("/tmp/fx/words.txt", str(folder / "words.txt")))
    return RunFolder(folder)


def losses(run: RunFolder) -> list[tuple[int, float]]:
    return [(r["step"], r["loss"]) for r in read_records(run.records(0), "step")]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_goes_on_with_the_losses_that_it_had(run, layout):
    mesh, zero = LAYOUTS[layout]
    config, plan = run.read()
    plan = replace(plan, mesh=mesh, zero=zero)
    source = resolve(config.model, seed=plan.train.seed)

    def work(rank: int) -> None:
        trainer = Trainer(source, config, plan, World(mesh, rank, torch.device("cpu")), run)
        trainer.restore(run.checkpoints / "step-3")
        trainer.run()

    if mesh.num_ranks == 1:
        work(0)
    else:
        run_ranks(work, mesh.num_ranks)
    recorded, found = losses(run)[:6], losses(run)[6:]
    assert [step for step, _ in recorded] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in found] == [4, 5, 6]
    for (_, loss), (_, expected) in zip(found, recorded[3:], strict=True):
        assert loss == pytest.approx(expected, rel=1e-6)
    assert read_manifest(run.checkpoints / "step-6").format == 2


def test_it_is_whole_and_says_what_it_has(run):
    manifest = read_manifest(run.checkpoints / "step-3")
    verify_files(run.checkpoints / "step-3", manifest)
    assert (manifest.format, manifest.step, manifest.progress) == (1, 3, None)
    entry = manifest.tensors["model.embedding.weight"]
    assert (entry.shape, entry.dtype, entry.axes, entry.pieces) == ((259, 48), "float32", (), ())


@pytest.mark.parametrize("verb", ["inspect", "verify"])
def test_the_command_reads_it(run, capsys, verb):
    found = command(capsys, verb, run.path, "--json")
    assert found["step"] == 3
    assert found.get("whole", True)


def test_it_is_exported(run, tmp_path):
    from transformers import AutoModelForCausalLM

    export(run.checkpoints / "step-3", run.model_files(), tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert model.config.vocab_size == 259
    start = resolve("random:llama:tiny").weights.read("embedding.weight")
    moved = (model.get_input_embeddings().weight.detach() - start).abs()
    assert 1e-5 < float(moved.max()) < 1e-2  # three steps of at most 3e-4, and what decays


def command(capsys: Any, *arguments: object) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["paceline", "checkpoint", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
    assert caught.value.code == 0
    return json.loads(capsys.readouterr().out)
