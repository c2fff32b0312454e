"""What a run reads: sources that have changed are noticed, moved ones are not minded."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from paceline.core.env import cache_folder
from paceline.core.errors import DataError, PacelineError, UsageError
from paceline.models.hub import resolve
from paceline.plan.plan import Plan, TrainConfig
from paceline.train.inputs import open_inputs
from paceline.train.job import new_job
from paceline.train.run import RunConfig, RunFolder

pytestmark = pytest.mark.cpu

MODEL = resolve("random:llama:tiny")
PLAN = Plan(train=TrainConfig(sequence_length=64, tokens_per_step=256))


@pytest.fixture
def sources(tmp_path) -> list[Path]:
    """A text, completions and a chat."""
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    paths = [tmp_path / name for name in ("a.txt", "b.jsonl", "c.jsonl")]
    paths[0].write_text("a text of some length. " * 20)
    pairs = [{"prompt": f"{n} + {n} = ", "completion": str(2 * n)} for n in range(20)]
    paths[1].write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    paths[2].write_text(json.dumps({"messages": chat}) + "\n")
    return paths


def config_of(sources: list[Path], **options) -> RunConfig:
    mixture = tuple(f"{path}={weight}" for path, weight in zip(sources, (2, 1), strict=False))
    return RunConfig(model=MODEL.name, data=mixture, steps=3, eval_data=str(sources[2]), **options)


def test_every_source_is_read_as_its_weight_says(sources):
    inputs = open_inputs(config_of(sources), PLAN, MODEL)
    assert len(inputs.config.data_identity) == 3
    assert inputs.held_out is not None
    rows = [
        row
        for step in range(1, 7)
        for batch in inputs.loader.microbatches(step, 0)
        for row in zip(batch.tokens_BT.tolist(), batch.labels_BT.tolist(), strict=True)
    ]
    are_text = [all(label >= 0 for label in labels[:-1]) for _, labels in rows]
    assert sum(are_text) == len(rows) * 2 // 3


def test_data_that_has_changed_is_named(sources):
    begun = open_inputs(config_of(sources), PLAN, MODEL).config
    assert open_inputs(begun, PLAN, MODEL).config == begun
    for path in sources:
        content = path.read_bytes()
        path.write_bytes(content.replace(b"h", b"H").replace(b"text", b"test").replace(b"8", b"9"))
        assert len(path.read_bytes()) == len(content)
        with pytest.raises(UsageError, match=f"{path} has changed since the run began") as caught:
            open_inputs(begun, PLAN, MODEL)
        assert caught.value.hint == "put it back as it was, or start a new run"
        path.write_bytes(content)
        open_inputs(begun, PLAN, MODEL)


def test_data_that_was_added_is_noticed(sources):
    begun = open_inputs(config_of(sources), PLAN, MODEL).config
    added = replace(begun, data=(*begun.sources, f"{sources[2]}=1"))
    with pytest.raises(UsageError, match="names 4 sources, but has hashes of 3"):
        open_inputs(added, PLAN, MODEL)


def test_data_that_has_moved_or_been_touched_is_the_same(sources, tmp_path):
    begun = open_inputs(config_of(sources), PLAN, MODEL).config
    (tmp_path / "moved").mkdir()
    moved = [Path(shutil.copy(path, tmp_path / "moved")) for path in sources]
    for path in moved:
        os.utime(path, (1, 1))
    again = replace(begun, data=config_of(moved).data, eval_data=config_of(moved).eval_data)
    assert open_inputs(again, PLAN, MODEL).config == again
    shutil.rmtree(cache_folder())  # another machine
    open_inputs(begun, PLAN, MODEL)


def test_another_chat_template_is_another_reading(sources):
    config = replace(config_of(sources), data=str(sources[0]))
    first = open_inputs(config, PLAN, MODEL).config.data_identity
    tokenizer = resolve(MODEL.name).tokenizer
    assert tokenizer.chat_template is not None
    tokenizer.chat_template = tokenizer.chat_template.replace("im_start", "im_end")
    second = open_inputs(config, PLAN, replace(MODEL, tokenizer=tokenizer)).config.data_identity
    assert first[0] == second[0]  # of text it is not part
    assert first[1] != second[1]


def broken_sources(tmp_path: Path) -> dict[str, tuple[Path, type[PacelineError], str]]:
    def written(name: str, content: bytes) -> Path:
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    long = json.dumps({"prompt": "x" * 70, "completion": "y"}).encode()
    asked = json.dumps({"messages": [{"role": "user", "content": "?"}]}).encode()
    return {
        "broken line": (
            written("a.jsonl", b'{"text": "a"}\n{"text'),
            DataError,
            "line 2: not JSON",
        ),
        "wrong type": (written("b.jsonl", b'{"text": 3}'), DataError, "line 1: text must be"),
        "no UTF-8": (written("c.unknown", b"abc\xff"), DataError, "not UTF-8 at byte 3"),
        "empty": (written("d.txt", b""), DataError, "holds no text"),
        "parquet": (written("e.parquet", b"PAR1cut"), DataError, "is not a whole Parquet file"),
        "no answer": (written("f.jsonl", asked), DataError, "line 1: no message of the assistant"),
        "too short": (written("g.txt", b"ab"), UsageError, "has 3 tokens"),
        "long example": (
            written("h.jsonl", b"\n" + long),
            UsageError,
            "line 2: 72 tokens, more than train.sequence_length = 64",
        ),
    }


@pytest.mark.parametrize(
    "case",
    [
        *("broken line", "wrong type", "no UTF-8", "empty", "parquet", "no answer"),
        *("too short", "long example"),
    ],
)
def test_what_cannot_be_read_is_named_and_leaves_nothing_half_written(tmp_path, sources, case):
    path, kind, message = broken_sources(tmp_path)[case]
    for config in (
        RunConfig(model=MODEL.name, data=str(path), steps=3),
        RunConfig(model=MODEL.name, data=str(sources[0]), steps=3, eval_data=str(path)),
    ):
        with pytest.raises(kind) as caught:
            open_inputs(config, PLAN, MODEL)
        assert str(path) in caught.value.message
        assert message in caught.value.message
    for folder in (cache_folder() / "tokens").iterdir():
        assert (folder / "source.json").exists()


def test_a_tokenised_source_is_whole(sources):
    open_inputs(config_of(sources), PLAN, MODEL)
    names = sorted(path.name for path in next((cache_folder() / "tokens").iterdir()).rglob("*"))
    assert "source.json" in names
    assert not [name for name in names if name.startswith(".")]


@pytest.mark.parametrize("given", [("a.txt",), ("a.txt=3",)])
def test_one_source_is_kept_as_its_path(sources, monkeypatch, given):
    monkeypatch.chdir(sources[0].parent)
    config = RunConfig(model=MODEL.name, data=given, steps=3)
    assert new_job(config, PLAN, RunFolder(Path("out"))).config.data == str(sources[0])


def test_a_mixture_is_kept_as_paths_with_weights(sources, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    odd = tmp_path / "x=1"
    odd.write_text("a path that looks like one with a weight")
    data = ("a.txt", "x=1", "builtin:python-stdlib=0.25")
    config = RunConfig(model=MODEL.name, data=data, steps=3, eval_data="c.jsonl")
    kept = new_job(config, PLAN, RunFolder(tmp_path / "out")).config
    assert kept.data == (f"{tmp_path}/a.txt=1.0", f"{odd}=1.0", "builtin:python-stdlib=0.25")
    assert kept.eval_data == str(sources[2])
    folder = RunFolder(tmp_path / "run")
    folder.start(replace(kept, data_identity=("abc", "def", "ghi", "jkl")), PLAN, {})
    assert folder.read()[0] == replace(kept, data_identity=("abc", "def", "ghi", "jkl"))
    text = (tmp_path / "run" / "run.toml").read_text()
    assert f'"{odd}=1.0"' in text
