from __future__ import annotations

import pytest

from paceline.core.errors import ConfigError, UsageError
from paceline.models.hub import resolve
from paceline.plan.mesh import MeshConfig
from paceline.plan.plan import PipelineConfig, Plan, TrainConfig, ZeroConfig
from paceline.train.run import RunConfig, RunFolder

pytestmark = pytest.mark.cpu

CONFIG = RunConfig(model="random:llama:tiny", data="builtin:python-stdlib", steps=7)
PLANS = [
    Plan(),
    Plan(
        mesh=MeshConfig(dp_shard=2, dp_replicate=3),
        zero=ZeroConfig(stage=0),
        pipeline=PipelineConfig(num_microbatches=3),
        train=TrainConfig(freeze=("blocks.0.*", 'a "quoted" one'), pack=False),
    ),
]


@pytest.mark.parametrize("plan", PLANS)
def test_a_run_folder_gives_back_what_it_was_started_with(tmp_path, plan):
    files = resolve("random:llama:tiny").files
    folder = RunFolder(tmp_path / "run")
    folder.start(CONFIG, plan, files)
    assert folder.read() == (CONFIG, plan)
    assert Plan.from_toml(tmp_path / "run" / "plan.toml") == plan
    assert folder.model_files() == files
    assert set(files) == {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_the_written_plan_has_every_key(tmp_path):
    RunFolder(tmp_path).start(CONFIG, Plan(), {})
    text = (tmp_path / "plan.toml").read_text()
    assert "sequence_length = 512" in text
    assert "warmup_steps = 0" in text


def test_a_folder_that_holds_a_run_is_left_as_it_is(tmp_path):
    folder = RunFolder(tmp_path)
    folder.require_new()
    folder.start(CONFIG, Plan(), {})
    for again in (
        folder.require_new,
        lambda: folder.start(CONFIG, PLANS[1], {"config.json": "{}"}),
    ):
        with pytest.raises(UsageError, match="holds a run already") as caught:
            again()
        assert caught.value.hint == f"paceline train --resume {tmp_path}, or another --out"
    assert folder.read() == (CONFIG, Plan())
    assert not (tmp_path / "model").exists()


def test_what_is_no_run_folder_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"is not a run folder: it has no run\.toml"):
        RunFolder(tmp_path).read()
    with pytest.raises(UsageError, match=r"is not a run folder: no model/config\.json"):
        RunFolder(tmp_path).model_files()
    RunFolder(tmp_path).start(CONFIG, Plan(), {})
    (tmp_path / "run.toml").write_text('model = "x"\ndata = "y"\n')
    with pytest.raises(ConfigError, match=r"run\.toml"):
        RunFolder(tmp_path).read()
