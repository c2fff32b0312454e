"""Models with an adapter whose every number differs from its start, shared by these tests."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from paceline.core import rng
from paceline.models.decoder import Decoder
from paceline.models.families import family
from paceline.models.peft import PEFT
from paceline.models.peft.attach import attach
from paceline.models.weights import RandomWeights, TensorWeights, build, fill
from paceline.plan.model_spec import ModelSpec
from paceline.plan.plan import PeftConfig

CPU = torch.device("cpu")
METHODS = [name for name in PEFT if name != "none"]
MERGED = ["lora", "dora", "ia3"]
VIRTUAL = ["prompt", "prefix"]


def spec_of(name: str = "llama") -> ModelSpec:
    """A tiny model with logits of size 1, so that what is compared matters."""
    return replace(family(name).PRESETS["tiny"], initializer_std=0.15)


def config_of(method: str) -> PeftConfig:
    """Sizes other than the defaults."""
    changes = {
        "lora": {"rank": 3, "alpha": 5.0},
        "dora": {"rank": 3, "alpha": 5.0},
        "prompt": {"virtual_tokens": 7},
        "prefix": {"virtual_tokens": 7},
        "bottleneck": {"width": 5},
    }
    return PeftConfig(method=method, **changes.get(method, {}))


def added_tensors(spec: ModelSpec, config: PeftConfig, *, std: float = 0.1) -> dict[str, Tensor]:
    """What a method adds, its start values disturbed."""
    model = build(spec)
    attached = attach(model, config, RandomWeights(spec))
    tensors = {}
    for name, parameter in model.named_parameters():
        if name in attached.added:
            draws = rng.normal(parameter.numel(), seed=1, purpose="test", stream=name)
            noise = torch.from_numpy(draws).view(parameter.shape).float()
            tensors[name] = attached.weights.read(name) + std * noise
    return tensors


def plain_model(spec: ModelSpec, dtype: torch.dtype = torch.float32) -> Decoder:
    model = build(spec, dtype)
    fill(model, RandomWeights(spec), CPU)
    return model.eval()


def adapted_model(
    spec: ModelSpec, config: PeftConfig, dtype: torch.dtype = torch.float32
) -> Decoder:
    model = build(spec, dtype)
    added = TensorWeights(added_tensors(spec, config))
    fill(model, attach(model, config, RandomWeights(spec), added=added).weights, CPU)
    return model.eval()


def tokens(rows: int, length: int, vocab_size: int = 259) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, vocab_size, (rows, length), generator=generator)


def difference(left: Tensor, right: Tensor) -> float:
    return float((left - right).abs().max())
