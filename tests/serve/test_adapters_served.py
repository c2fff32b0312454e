"""The engine with an adapter: what it answers is what the plain forward pass says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engines import GREEDY

from paceline.core.errors import RequestError
from paceline.models.adapters import resolve_adapted
from paceline.models.decoder import Decoder
from paceline.models.hub import ModelSource, resolve
from paceline.models.peft import PEFT
from paceline.models.peft.attach import attach
from paceline.models.peft.files import write_adapter
from paceline.models.weights import RandomWeights, build, fill
from paceline.plan.plan import PeftConfig, Plan
from paceline.serve.load import load_engine
from paceline.serve.request import Request

pytestmark = pytest.mark.cpu

METHODS = [name for name in PEFT if name != "none"]
PLAN = Plan().with_overrides(['serve.dtype="float32"', "serve.max_batch_tokens=7"])


def make(folder: Path, method: str) -> tuple[ModelSource, Decoder]:
    """A tiny model that says various things with an adapter, and its plain form."""
    base = resolve("random:llama:tiny")
    spec = replace(base.spec, initializer_std=0.15)
    model, config = build(spec), PeftConfig(method=method)
    attached = attach(model, config, RandomWeights(spec))
    fill(model, attached.weights, torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    tensors: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for name in sorted(attached.added):
            parameter = model.get_parameter(name)
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
            tensors[name] = parameter.detach()
    write_adapter(folder, spec, config, base.name, tensors)
    adapter = resolve_adapted(base.name, folder).adapter
    return replace(base, spec=spec, weights=RandomWeights(spec), adapter=adapter), model.eval()


@torch.inference_mode()
def plain_tokens(model: Decoder, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


def request(prompt: list[int], max_tokens: int) -> Request:
    return Request(
        prompt_ids=tuple(prompt), sampling=GREEDY, max_tokens=max_tokens, ignore_eos=True
    )


@pytest.mark.parametrize("method", METHODS)
def test_answers_are_those_of_the_plain_model(tmp_path, method):
    source, model = make(tmp_path, method)
    engine = load_engine(source, PLAN, device="cpu")
    prompts = [[5, 9, 1, 77, 30, 8, 6, 120, 14], [200]]  # in chunks of seven, and alone
    answers = engine.generate([request(prompt, 20) for prompt in prompts])
    for prompt, answer in zip(prompts, answers, strict=True):
        assert list(answer.token_ids) == plain_tokens(model, prompt, 20)
    without = load_engine(replace(source, adapter=None), PLAN, device="cpu")
    assert without.generate([request(prompts[0], 20)])[0].token_ids != answers[0].token_ids


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_virtual_tokens_take_their_part_of_the_context(tmp_path, method):
    source, model = make(tmp_path, method)
    room = source.spec.max_positions - 16
    engine = load_engine(source, PLAN, device="cpu")
    assert engine.spec.max_positions == room
    prompt = [n % 250 for n in range(room - 3)]
    (answer,) = engine.generate([request(prompt, 3)])
    assert list(answer.token_ids) == plain_tokens(model, prompt, 3)
    with pytest.raises(RequestError, match=f"exceed the context of {room}"):
        engine.generate([request(prompt, 4)])
