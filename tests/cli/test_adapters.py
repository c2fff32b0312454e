"""An adapter through the commands: trained, inspected, exported, merged, asked."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from paceline.cli.main import main

pytestmark = [pytest.mark.cpu, pytest.mark.ranks]

MODEL = "random:llama:tiny"
SETTINGS = (
    *("train.sequence_length=16", "train.tokens_per_step=64", "optimizer.lr=0.5"),
    *("optimizer.clip_norm=0", 'optimizer.name="adamw"'),
)


def run_inside(*arguments: object) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["paceline", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
    return caught.value.code


@pytest.fixture
def paceline(capsys):
    """Runs a command: exit code, stdout, stderr."""

    def call(*arguments: object) -> tuple[Any, str, str]:
        capsys.readouterr()
        code = run_inside(*arguments)
        return code, *capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict[str, Path]:
    """Runs of two methods with a rate so high that what they answer changes."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "data.txt").write_text("to and fro " * 100)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        for method in ("lora", "prefix"):
            given = [
                *("train", MODEL, "--data", folder / "data.txt", "--out", folder / method),
                *("--steps", 3, "--set", f'peft.method="{method}"'),
                *(part for setting in SETTINGS for part in ("--set", setting)),
            ]
            assert run_inside(*given) == 0
    return {method: folder / method for method in ("lora", "prefix")}


def ask(paceline: Any, model: object, *options: object) -> list[int]:
    code, out, err = paceline(
        *("generate", model, "--prompt", "to and", "--max-tokens", 12, "--json"),
        *("--dtype", "float32", *options),
    )
    assert code == 0, err
    return json.loads(out)["token_ids"]


@pytest.mark.parametrize("method", ["lora", "prefix"])
def test_an_adapter_is_exported_and_asked(paceline, trained, tmp_path, method):
    adapter = tmp_path / "adapter"
    code, out, err = paceline("checkpoint", "export", trained[method], "-o", adapter)
    assert (code, out, err) == (0, f"{adapter}\n", "")
    assert {path.name for path in adapter.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == MODEL
    answer = ask(paceline, adapter)
    assert answer == ask(paceline, MODEL, "--adapter", adapter)
    assert answer != ask(paceline, MODEL)


def test_an_adapter_is_merged_into_a_model(paceline, trained, tmp_path):
    assert paceline("checkpoint", "export", trained["lora"], "-o", tmp_path / "a")[0] == 0
    code, out, err = paceline(
        "checkpoint", "export", trained["lora"], "-o", tmp_path / "m", "--merge", "--json"
    )
    assert (code, err) == (0, "")
    assert json.loads(out)["path"] == str(tmp_path / "m")
    assert (tmp_path / "m" / "model.safetensors").exists()
    assert ask(paceline, tmp_path / "m") == ask(paceline, tmp_path / "a")


def test_what_cannot_be_merged_says_why(paceline, trained, tmp_path):
    code, out, err = paceline(
        "checkpoint", "export", trained["prefix"], "-o", tmp_path / "m", "--merge"
    )
    assert (code, out) == (2, "")
    assert err.startswith("error: peft.method = prefix cannot be merged: virtual tokens stand")
    assert not (tmp_path / "m").exists()


def test_a_checkpoint_holds_the_adapter_alone(paceline, trained):
    code, out, _ = paceline("checkpoint", "inspect", trained["lora"], "--json")
    assert code == 0
    names = set(json.loads(out)["tensors"])
    assert names
    assert all(".lora_a" in name or ".lora_b" in name for name in names)


def test_a_run_is_resumed_from_its_model_and_its_adapter(paceline, trained, tmp_path):
    run = Path(shutil.copytree(trained["lora"], tmp_path / "run"))
    code, _, err = paceline("train", "--resume", run, "--steps", 4)
    assert code == 0, err
    assert (run / "checkpoints" / "step-4" / "manifest.json").exists()


def test_mistakes(paceline, trained, tmp_path):
    adapter = tmp_path / "adapter"
    assert paceline("checkpoint", "export", trained["lora"], "-o", adapter)[0] == 0
    (tmp_path / "data.txt").write_text("to and fro " * 100)
    train = ("train", adapter, "--data", tmp_path / "data.txt", "--out", tmp_path / "x")
    cases = {
        "is an adapter, which is no model by itself": train,
        "is an adapter itself": ("generate", adapter, "--adapter", adapter, "--prompt", "x"),
        "adapter_config.json: no such file": (
            *("generate", MODEL, "--adapter", tmp_path, "--prompt", "x"),
        ),
        "names no layer of a gpt2 model": (
            *("generate", "random:gpt2:tiny", "--adapter", adapter, "--prompt", "x"),
        ),
        'peft.method = "lorra": is no method of fine-tuning': (
            *("verify", "--set", 'peft.method="lorra"'),
        ),
        "peft.targets = *.querry: matches no linear layer": (
            *("verify", "--set", "peft.method=lora", "--set", 'peft.targets=["*.querry"]'),
        ),
        "does not go with peft.method = lora": (
            *("verify", "--set", "peft.method=lora", "--set", 'train.freeze=["*"]'),
        ),
    }
    for message, arguments in cases.items():
        code, out, err = paceline(*arguments)
        assert (code, out) == (2, ""), (message, err)
        assert err.count("error: ") == 1
        assert message in err
        assert "Traceback" not in err


def test_a_random_model_of_another_seed_has_no_name(paceline, trained, tmp_path):
    run = Path(shutil.copytree(trained["lora"], tmp_path / "run"))
    text = (run / "plan.toml").read_text()
    assert "seed = 0" in text
    (run / "plan.toml").write_text(text.replace("seed = 0", "seed = 3"))
    code, _, err = paceline("checkpoint", "export", run, "-o", tmp_path / "out")
    assert code == 2
    assert f"{MODEL} has other weights than it had in this run: train.seed = 3" in err


def test_nothing_to_merge(paceline, tmp_path):
    (tmp_path / "data.txt").write_text("to and fro " * 100)
    settings = (part for setting in SETTINGS for part in ("--set", setting))
    given = ("train", MODEL, "--data", tmp_path / "data.txt", "--out", tmp_path / "run")
    assert paceline(*given, "--steps", 1, *settings)[0] == 0
    code, _, err = paceline(
        "checkpoint", "export", tmp_path / "run", "-o", tmp_path / "m", "--merge"
    )
    assert code == 2
    assert "holds no adapter to merge" in err


def test_verify_certifies_a_plan_with_an_adapter(paceline):
    code, out, err = paceline(
        *("verify", "--set", "peft.method=lora", "--set", "mesh.dp_shard=2", "--json")
    )
    assert code == 0, err
    certificate = json.loads(out)
    assert certificate["certified"]
    assert certificate["max_rel_grad_error"] <= 1e-12
    assert "blocks.0.attention.query.lora_b" in certificate["per_parameter"]
