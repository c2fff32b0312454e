"""Which layers are adapted, and what is said about those that are not there."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from adapted import CPU, METHODS, added_tensors, config_of, difference, spec_of, tokens

from paceline.core.errors import ConfigError
from paceline.models.peft.attach import MergedWeights, attach
from paceline.models.weights import RandomWeights, TensorWeights, build, fill
from paceline.plan.plan import PeftConfig

pytestmark = pytest.mark.cpu


def modules_of(config: PeftConfig, spec=None) -> set[str]:
    spec = spec or spec_of()
    added = attach(build(spec), config, RandomWeights(spec)).added
    return {name.rpartition(".")[0] for name in added}


def test_usual_targets():
    parts = ("attention.query", "attention.key", "attention.value", "attention.output")
    linear = {*parts, "ffn.gate", "ffn.up", "ffn.down"}
    expected = {
        "lora": linear,
        "dora": linear,
        "ia3": {"attention.key", "attention.value", "ffn.down"},
        "bottleneck": {"attention.output", "ffn.down"},
    }
    for method, names in expected.items():
        found = modules_of(PeftConfig(method=method))
        assert found == {f"blocks.{layer}.{name}" for layer in range(3) for name in names}


def test_chosen_targets():
    config = PeftConfig(method="lora", targets=("blocks.1.*.query", "*.2.ffn.[ud]*"))
    assert modules_of(config) == {
        "blocks.1.attention.query",
        "blocks.2.ffn.up",
        "blocks.2.ffn.down",
    }
    untied = replace(spec_of(), tied_embeddings=False)
    assert modules_of(PeftConfig(method="lora", targets=("head",)), untied) == {"head"}


@pytest.mark.parametrize(
    "pattern", ["blocks.0.attention.querry", "blocks.9.*", "embedding", "*.up.weight"]
)
def test_a_target_that_matches_nothing(pattern):
    config = PeftConfig(method="lora", targets=("*.ffn.up", pattern))
    with pytest.raises(ConfigError) as caught:
        modules_of(config)
    (problem,) = caught.value.problems
    assert (problem.path, problem.value) == ("peft.targets", pattern)
    assert problem.rule == "matches no linear layer that can be adapted"
    if "querry" in pattern:
        assert problem.hint.startswith("did you mean blocks.0.attention.query or ")


def test_routers_are_no_target_and_norms_are_left_alone():
    spec = spec_of("mixtral")
    config = PeftConfig(method="ia3", targets=("blocks.*",))
    assert not any(name.endswith("router") for name in modules_of(config, spec))
    tensors = added_tensors(spec, config)
    base, merged = RandomWeights(spec), build(spec)
    weights = MergedWeights(spec, config, base, TensorWeights(tensors))
    fill(merged, weights, CPU)
    for name, parameter in merged.named_parameters():
        module = name.rpartition(".")[0]
        assert torch.equal(parameter, base.read(name)) == (f"{module}.ia3" not in tensors), name


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_weights_in_float32_compute_in_bfloat16(method):
    """New parameters are cast as they are used, as the model's own are."""
    spec, config = spec_of(), config_of(method)
    added = TensorWeights(added_tensors(spec, config))
    models = []
    for dtype in (None, torch.bfloat16):
        model = build(spec)
        model.compute_dtype = dtype
        fill(model, attach(model, config, RandomWeights(spec), added=added).weights, CPU)
        models.append(model)
    exact, rounded = (model(tokens(2, 9)) for model in models)
    assert rounded.dtype == torch.bfloat16
    assert 0 < difference(rounded.float(), exact) < 0.5  # of logits of size 1, in 8 bits
