"""Tiny models with adapters of several sizes and methods, for tests that serve them together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from paceline.core import rng
from paceline.models.hub import ModelSource, resolve
from paceline.models.peft.attach import attach
from paceline.models.peft.files import open_adapter, write_adapter
from paceline.models.weights import RandomWeights, build
from paceline.plan.plan import PeftConfig, Plan
from paceline.serve.engine import Engine
from paceline.serve.load import load_engine
from paceline.serve.request import Request

CONFIGS = {
    "ada": PeftConfig(method="lora", rank=3, alpha=5.0),
    "bob": PeftConfig(method="lora", rank=8, alpha=4.0, targets=("blocks.*.attention.*",)),
    "cyd": PeftConfig(method="dora", rank=2),
    "dan": PeftConfig(method="ia3"),
}
NAMES = ("", *CONFIGS)
FLOAT32 = 'serve.dtype="float32"'


def source_of(family: str) -> ModelSource:
    """A model whose logits are of size 1, so that prompts and adapters matter."""
    source = resolve(f"random:{family}:tiny")
    spec = replace(source.spec, initializer_std=0.15)
    return replace(source, spec=spec, weights=RandomWeights(spec))


def write(folder: Path, source: ModelSource, config: PeftConfig) -> Path:
    """An adapter whose numbers follow from the folder's name."""
    folder.mkdir()
    model = build(source.spec)
    attached = attach(model, config, source.weights)
    tensors = {}
    for name in sorted(attached.added):
        shape = model.get_parameter(name).shape
        draws = rng.normal(shape.numel(), seed=1, purpose="test", stream=f"{folder.name} {name}")
        noise = torch.from_numpy(0.2 * draws).view(shape).float()
        tensors[name] = attached.weights.read(name).float() + noise
    write_adapter(folder, source.spec, config, source.name, tensors)
    return folder


def write_all(folder: Path, source: ModelSource) -> dict[str, Path]:
    return {name: write(folder / name, source, config) for name, config in CONFIGS.items()}


def engine_of(source: ModelSource, folders: dict[str, Path], *settings: str) -> Engine:
    """An engine with all adapters beside its model."""
    named = [f"serve.adapters.{name}={folder}" for name, folder in folders.items()]
    return load_engine(source, Plan().with_overrides([FLOAT32, *named, *settings]), device="cpu")


def merged_engine(source: ModelSource, folder: Path | None) -> Engine:
    """An engine that has nothing but the adapter."""
    adapter = open_adapter(folder, source.spec) if folder else None
    plan = Plan().with_overrides([FLOAT32])
    return load_engine(replace(source, adapter=adapter), plan, device="cpu")


Answers = dict[str, list[tuple[int, ...]]]
"""Name of an adapter, empty for none, to the tokens of its answers."""


def answers_alone(
    source: ModelSource, folders: dict[str, Path], requests: Sequence[Request]
) -> Answers:
    """What each merged model answers."""
    engines = {name: merged_engine(source, folders.get(name)) for name in ("", *folders)}
    return {
        name: [answer.token_ids for answer in engine.generate(requests)]
        for name, engine in engines.items()
    }


def answers_together(engine: Engine, requests: Sequence[Request]) -> Answers:
    """What one engine answers, asked for all adapters at once."""
    names = ("", *engine.adapters)
    asked = [replace(request, adapter=name) for request in requests for name in names]
    found: Answers = {name: [] for name in names}
    for request, answer in zip(asked, engine.generate(asked), strict=True):
        found[request.adapter].append(answer.token_ids)
    return found
