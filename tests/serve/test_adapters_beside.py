"""Adapters beside each other in one batch: each answers as the model that it is merged into."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
from engines import GREEDY
from tenants import (
    CONFIGS,
    NAMES,
    answers_alone,
    answers_together,
    engine_of,
    merged_engine,
    source_of,
    write,
    write_all,
)

from paceline.core.errors import ConfigError, RequestError, UsageError
from paceline.decode.sampler import SamplingParams
from paceline.models.hub import resolve
from paceline.models.peft import PEFT
from paceline.models.peft.files import open_adapter
from paceline.models.peft.segments import Segment, Segments
from paceline.plan.plan import PeftConfig, Plan
from paceline.serve.adapters import adapter_named, require_names_apart
from paceline.serve.kv.owner import root
from paceline.serve.load import BLOCK_SIZE, load_engine
from paceline.serve.request import Request

pytestmark = pytest.mark.cpu

FAMILIES = ["llama", "qwen2", "gemma3", "mixtral"]
LONG = [n % 250 for n in range(2 * BLOCK_SIZE + 5)]


def request(prompt: list[int], *, seed: int | None = None, max_tokens: int = 12) -> Request:
    sampling = GREEDY if seed is None else SamplingParams(temperature=1.0, seed=seed)
    return Request(
        prompt_ids=tuple(prompt), sampling=sampling, max_tokens=max_tokens, ignore_eos=True
    )


REQUESTS = [request([5, 9, 1, 77, 30, 8, 6, 120, 14]), request([200], seed=3), request(LONG)]


class Case:
    """A model, its adapters, and what each of them answers alone."""

    def __init__(self, family: str, folder: Path) -> None:
        folder.mkdir()
        self.source = source_of(family)
        self.folders = write_all(folder, self.source)
        self.alone = answers_alone(self.source, self.folders, REQUESTS)

    def engine(self, *settings: str):
        return engine_of(self.source, self.folders, *settings)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Case:
    return Case("llama", tmp_path_factory.mktemp("tenants") / "llama")


# What is answered.


@pytest.mark.parametrize("family", FAMILIES)
def test_all_together_is_each_alone(family, tmp_path):
    case = Case(family, tmp_path / family)
    texts = [tuple(answers) for answers in case.alone.values()]
    assert len(set(texts)) == len(NAMES)  # each adapter says something of its own
    assert answers_together(case.engine(), REQUESTS) == case.alone


def test_one_adapter_at_a_time_is_all_together(llama):
    engine = llama.engine()
    for name in NAMES:
        for asked, expected in zip(REQUESTS, llama.alone[name], strict=True):
            (answer,) = engine.generate([of(asked, name)])
            assert answer.token_ids == expected


def of(asked: Request, name: str) -> Request:
    return replace(asked, adapter=name)


@pytest.mark.parametrize("max_batch_tokens", [1, 7, 40])
def test_chunks(llama, max_batch_tokens):
    engine = llama.engine(f"serve.max_batch_tokens={max_batch_tokens}")
    assert answers_together(engine, REQUESTS) == llama.alone


def test_preempted_requests(llama):
    probe = llama.engine("serve.max_sequences=1")
    width = 2 * probe.spec.num_layers * probe.spec.num_kv_heads * probe.spec.head_dim * 4
    engine = llama.engine(f"serve.kv_memory_bytes={8 * width * BLOCK_SIZE}")
    assert engine.book.kv.pool.num_blocks == 8
    longer = [request(LONG[:20], max_tokens=40), request(LONG[3:18], seed=5, max_tokens=40)]
    alone = answers_alone(llama.source, llama.folders, longer)
    assert answers_together(engine, longer) == alone
    assert engine.book.num_preempted > 0


def test_blocks_are_found_again_by_their_own_adapter_alone(llama):
    engine = llama.engine()
    for name in NAMES:
        before = engine.book.num_found_tokens
        engine.generate([of(REQUESTS[2], name)])
        assert engine.book.num_found_tokens == before  # what others have computed is not its own
    before = engine.book.num_found_tokens
    assert answers_together(engine, REQUESTS) == llama.alone
    assert engine.book.num_found_tokens - before >= len(NAMES) * 2 * BLOCK_SIZE


# A comparison that could not fail would prove nothing.


def shift_rows(monkeypatch) -> None:
    right = Segments.set

    def wrong(self, adapters, lengths):
        right(self, adapters, lengths)
        self.adapted = tuple(
            Segment(one.adapter, slice(max(0, one.rows.start - 1), one.rows.stop - 1))
            for one in self.adapted
        )

    monkeypatch.setattr(Segments, "set", wrong)


def swap_adapters(monkeypatch) -> None:
    right = Segments.set
    other = dict(zip(CONFIGS, [*list(CONFIGS)[1:], "ada"], strict=True))

    def wrong(self, adapters, lengths):
        right(self, adapters, lengths)
        self.adapted = tuple(Segment(other[one.adapter], one.rows) for one in self.adapted)

    monkeypatch.setattr(Segments, "set", wrong)


def forget_scale(monkeypatch) -> None:
    def wrong(_config, module, added):
        return added.read(f"{module}.lora_a"), added.read(f"{module}.lora_b")

    monkeypatch.setattr("paceline.models.peft.lora.factors", wrong)


def forget_adapter_in_root(monkeypatch) -> None:
    monkeypatch.setattr("paceline.serve.engine.root", lambda tenant, _adapter: root(tenant))


def test_the_comparison_sees_shifted_rows(llama, monkeypatch):
    shift_rows(monkeypatch)
    assert answers_together(llama.engine(), REQUESTS) != llama.alone


def test_the_comparison_sees_another_adapter(llama, monkeypatch):
    swap_adapters(monkeypatch)
    found = answers_together(llama.engine(), REQUESTS)
    assert found[""] == llama.alone[""]
    assert all(found[name] != llama.alone[name] for name in CONFIGS)


def test_the_comparison_sees_a_forgotten_scale(llama, monkeypatch):
    forget_scale(monkeypatch)
    found = answers_together(llama.engine(), REQUESTS)
    assert {name for name in NAMES if found[name] != llama.alone[name]} == {"ada", "bob"}


def test_the_comparison_sees_blocks_that_are_shared(llama, monkeypatch):
    forget_adapter_in_root(monkeypatch)
    engine = llama.engine()
    first, second = (engine.generate([of(REQUESTS[2], name)])[0] for name in ("ada", "dan"))
    assert first.token_ids == llama.alone["ada"][2]
    assert second.token_ids != llama.alone["dan"][2]


# What is refused, and how it is told.


def test_names(llama):
    assert llama.engine().adapters == tuple(CONFIGS)
    assert merged_engine(llama.source, None).adapters == ()


def test_an_unknown_adapter_is_a_404_that_names_the_others(llama):
    with pytest.raises(RequestError, match="no adapter 'eve'") as caught:
        llama.engine().generate([of(REQUESTS[0], "eve")])
    assert (caught.value.status, caught.value.param) == (404, "model")
    assert caught.value.hint == "one of ada, bob, cyd, dan"
    with pytest.raises(RequestError, match="this engine has none"):
        merged_engine(llama.source, None).submit(of(REQUESTS[0], "ada"), print)


def test_what_the_model_field_means():
    assert adapter_named("tiny", "tiny", ["ada"]) == ""
    assert adapter_named("ada", "tiny", ["ada"]) == "ada"
    with pytest.raises(RequestError, match="no model 'eve'") as caught:
        adapter_named("eve", "tiny", ["bob", "ada"])
    assert (caught.value.status, caught.value.hint) == (404, "one of tiny, ada, bob")
    require_names_apart("tiny", ["ada"])
    with pytest.raises(UsageError, match="'ada' is the model's name and that of one"):
        require_names_apart("ada", ["ada"])


@pytest.mark.parametrize("method", ["prompt", "prefix", "bottleneck"])
def test_what_is_served_alone(llama, tmp_path, method):
    folder = write(tmp_path / "eve", llama.source, PeftConfig(method=method))
    with pytest.raises(UsageError) as caught:
        engine_of(llama.source, {**llama.folders, "eve": folder})
    assert f"serve.adapters.eve: {folder} ({method}) cannot be served beside" in str(caught.value)
    assert PEFT.load(method).why_alone in str(caught.value)
    assert caught.value.hint == f"serve it alone: --adapter {folder}"


def test_an_adapter_of_the_head_is_served_alone(tmp_path):
    source = source_of("mixtral")
    folder = write(tmp_path / "eve", source, PeftConfig(method="lora", targets=("head",)))
    with pytest.raises(UsageError, match="it adapts the output head"):
        engine_of(source, {"eve": folder})


def test_adapters_are_for_the_model_without_one(llama):
    adapter = open_adapter(llama.folders["ada"], llama.source.spec)
    with pytest.raises(UsageError, match="has an adapter already") as caught:
        engine_of(replace(llama.source, adapter=adapter), llama.folders)
    assert caught.value.hint.endswith(f"serve.adapters.NAME = {llama.folders['ada']}")


def test_another_models_adapter(llama, tmp_path):
    folder = write(tmp_path / "eve", resolve("random:llama:small"), CONFIGS["bob"])
    with pytest.raises(UsageError, match="the adapter belongs to another model"):
        engine_of(llama.source, {"eve": folder})


def test_memory_is_told_and_another_base_is_warned_of(llama, caplog):
    caplog.set_level(logging.INFO)
    engine_of(replace(llama.source, name="other"), {"ada": llama.folders["ada"]})
    texts = [record.getMessage() for record in caplog.records]
    assert "adapter ada names random:llama:tiny as its base, not other" in texts
    assert any(text.startswith("adapter ada: lora, ") and " MB beside" in text for text in texts)


def test_a_plan_that_cannot_be_served(llama):
    plan = Plan().with_overrides(["serve.adapters.ada=a", "serve.batch_invariant=true"])
    with pytest.raises(ConfigError, match=r"set serve\.batch_invariant = false"):
        load_engine(llama.source, plan, device="cpu")
