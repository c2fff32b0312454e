"""Adapters beside a model: each row of a pass is what the model with its adapter alone says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from adapted import CPU, MERGED, METHODS, added_tensors, spec_of
from torch import Tensor

from paceline.core import rng
from paceline.models.decoder import Decoder
from paceline.models.fuse import fuse, parts
from paceline.models.layout import Layout
from paceline.models.linear import Linear
from paceline.models.peft.attach import MergedWeights, method_of
from paceline.models.peft.beside import Beside, put_beside
from paceline.models.peft.files import Adapter
from paceline.models.peft.names import candidates
from paceline.models.weights import RandomWeights, Weights, build, fill
from paceline.plan.model_spec import ModelSpec
from paceline.plan.plan import PeftConfig

pytestmark = pytest.mark.cpu

BOUND = 1e-11
"""Of float64: the base and what is added are summed in another order than in a merged matrix."""
FAMILIES = ["llama", "qwen2", "gemma3", "gpt2", "qwen2-moe"]
CONFIGS = {
    "large": PeftConfig(method="lora", rank=9, alpha=4.0),
    "of-few": PeftConfig(
        method="lora",
        rank=2,
        alpha=7.0,
        targets=("blocks.*.attention.value", "blocks.0.attention.output", "blocks.1.*.up"),
    ),
    "of-dora": PeftConfig(method="dora", rank=3, alpha=5.0),
    "of-ia3": PeftConfig(method="ia3"),
}


class Uneven:
    """Random weights in float64, whose biases are not zero."""

    def __init__(self, spec: ModelSpec) -> None:
        self._weights = RandomWeights(spec)

    def read(self, name: str) -> Tensor:
        value = self._weights.read(name).double()
        if not name.endswith(".bias"):
            return value
        draws = rng.normal(value.numel(), seed=3, purpose="test", stream=name)
        return torch.from_numpy(0.3 * draws).view_as(value)


def adapters_of(spec: ModelSpec) -> dict[str, Adapter]:
    found = {}
    for name, config in CONFIGS.items():
        tensors = added_tensors(spec, config, std=0.2)
        found[name] = Adapter(Path(name), config, {key: v.double() for key, v in tensors.items()})
    return found


def filled(spec: ModelSpec, weights: Weights) -> Decoder:
    model = build(spec, torch.float64)
    fill(model, weights, CPU)
    return model.eval()


def model_beside(spec: ModelSpec, *, is_fused: bool = True) -> tuple[Decoder, Beside]:
    model = filled(spec, Uneven(spec))
    if is_fused:
        fuse(model)
    return model, put_beside(model, Uneven(spec), adapters_of(spec))


@torch.no_grad()
def errors(model: Decoder, beside: Beside, sequences: list[tuple[str, int]]) -> list[float]:
    """How far each sequence of a pass is from the merged model, over its largest logit."""
    found, spec = [], model.spec
    lengths = [length for _, length in sequences]
    generator = torch.Generator().manual_seed(5)
    tokens_1T = torch.randint(0, spec.vocab_size, (1, sum(lengths)), generator=generator)
    positions = torch.cat([torch.arange(length) for length in lengths])
    documents = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    beside.segments.set([name for name, _ in sequences], lengths)
    logits_1TV = model(tokens_1T, Layout(positions[None], documents[None]))
    for (name, _), row_TV, ids in zip(
        sequences, logits_1TV[0].split(lengths), tokens_1T[0].split(lengths), strict=True
    ):
        adapter, own = adapters_of(spec).get(name), Uneven(spec)
        weights = own if adapter is None else MergedWeights(spec, adapter.config, own, adapter)
        expected_TV = filled(spec, weights)(ids[None])[0]
        found.append(float((row_TV - expected_TV).abs().max() / expected_TV.abs().max()))
    return found


SEQUENCES = [("", 3), ("large", 1), ("large", 2), ("of-dora", 4), ("of-few", 20), ("of-ia3", 1)]


@pytest.mark.parametrize(
    ("family", "is_fused"), [*((family, True) for family in FAMILIES), ("qwen2", False)]
)
def test_rows_are_those_of_merged_models(family, is_fused):
    model, beside = model_beside(spec_of(family), is_fused=is_fused)
    assert max(errors(model, beside, SEQUENCES)) <= BOUND
    assert max(errors(model, beside, [("of-few", 2)])) <= BOUND
    assert max(errors(model, beside, [("", 7)])) <= BOUND


def test_each_adapter_makes_a_difference():
    """Or the comparison would say nothing."""
    spec, tokens = spec_of("qwen2"), torch.arange(9)[None]
    with torch.no_grad():
        plain = filled(spec, Uneven(spec))(tokens)
        for adapter in adapters_of(spec).values():
            weights = MergedWeights(spec, adapter.config, Uneven(spec), adapter)
            assert float((filled(spec, weights)(tokens) - plain).abs().max()) > 0.1


def test_a_pass_that_is_not_the_one_that_was_announced_is_an_error():
    model, beside = model_beside(spec_of())
    beside.segments.set(["large"], [4])
    with pytest.raises(AssertionError, match="the pass is not what its segments say"):
        model(torch.arange(5)[None])


def test_what_multiplies_stays_what_it_is():
    """Another product, of packed weights say, goes on computing the layer itself."""
    spec = spec_of()
    model, asked = filled(spec, RandomWeights(spec)), []

    def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        asked.append(weight)
        return torch.nn.functional.linear(x, weight, bias)

    linears = [module for module in model.modules() if isinstance(module, Linear)]
    for linear in linears:
        linear.product = product
    beside = put_beside(model, RandomWeights(spec), adapters_of(spec))
    beside.segments.set(["large"], [5])
    with torch.no_grad():
        model(torch.arange(5)[None])
    in_blocks = [linear for linear in linears if linear.out_features != spec.vocab_size]
    assert [id(weight) for weight in asked] == [id(linear.weight) for linear in in_blocks]


def test_bytes_are_those_of_the_factors():
    spec = replace(spec_of(), num_layers=1)
    config = PeftConfig(method="lora", rank=4, targets=("blocks.0.attention.output",))
    adapter = Adapter(Path("a"), config, added_tensors(spec, config))
    model = filled(spec, RandomWeights(spec))
    beside = put_beside(model, RandomWeights(spec), {"a": adapter})
    assert beside.num_bytes == {"a": 8 * 4 * (spec.d_query + spec.d_model)}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_projection_is_found_when_fused(family):
    model = filled(spec_of(family), RandomWeights(spec_of(family)))
    names = candidates(model)
    before = {name: model.get_submodule(name).weight.detach().clone() for name in names}
    fuse(model)
    found = parts(model)
    assert set(names) <= set(found)
    for name, weight in before.items():
        layer, columns = found[name]
        assert torch.equal(layer.weight[columns], weight), name


def test_every_method_is_served_so_or_says_why_not():
    for method in METHODS:
        config = PeftConfig(method=method)
        assert bool(method_of(config).why_alone) == (method not in MERGED)
