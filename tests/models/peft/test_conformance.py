"""What holds for every method of the table."""

from __future__ import annotations

import importlib
from dataclasses import replace

import pytest
import torch
from adapted import (
    CPU,
    MERGED,
    METHODS,
    adapted_model,
    added_tensors,
    config_of,
    difference,
    plain_model,
    spec_of,
    tokens,
)

from paceline.models.peft import PEFT
from paceline.models.peft.attach import MergedWeights, attach, method_of
from paceline.models.peft.files import open_adapter, write_adapter
from paceline.models.weights import RandomWeights, TensorWeights, build, fill
from paceline.plan.check import check
from paceline.plan.mesh import MeshConfig
from paceline.plan.plan import PeftConfig, Plan, TrainConfig
from paceline.plan.rules.training import PEFT_KEYS
from paceline.verify.certify import BOUND, certify

pytestmark = [pytest.mark.cpu, pytest.mark.ranks]

FAMILIES = ["llama", "gemma3", "gpt2", "mixtral"]


@pytest.mark.parametrize("name", PEFT)
def test_the_docstring_has_all_its_labels(name):
    docstring = importlib.import_module(PEFT[name].split(":")[0]).__doc__
    for label in ("Source:", "Replaces:", "Needs:", "Forbids:", "Cost:", "Differs:"):
        assert label in docstring
    assert "arXiv:" in docstring


@pytest.mark.parametrize("method", METHODS)
def test_a_plan_comes_back_from_its_file(method):
    plan = Plan(peft=config_of(method))
    assert Plan.from_dict(plan.to_dict()) == plan
    assert check(plan) == []
    changed = {key for key in PEFT_KEYS if getattr(plan.peft, key) != getattr(PeftConfig(), key)}
    assert all(method in PEFT_KEYS[key] for key in changed)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_only_what_is_added_has_gradients(method, family):
    spec = spec_of(family)
    own = [name for name, _ in build(spec).named_parameters()]
    model = build(spec)
    attached = attach(model, config_of(method), RandomWeights(spec))
    names = [name for name, _ in model.named_parameters()]
    assert [name for name in names if name not in attached.added] == own
    assert set(names) - set(own) == attached.added != set()
    model = adapted_model(spec, config_of(method))
    model(tokens(2, 9)).square().sum().backward()
    for name, parameter in model.named_parameters():
        if name in attached.added:
            assert parameter.grad is not None, name
            assert float(parameter.grad.abs().max()) > 0, name
        else:
            assert parameter.grad is None, name
            assert torch.equal(parameter, plain_model(spec).get_parameter(name)), name


@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
def test_the_start_is_the_model_itself(method):
    spec = spec_of()
    model = build(spec)
    fill(model, attach(model, config_of(method), RandomWeights(spec)).weights, CPU)
    with torch.no_grad():
        assert difference(model(tokens(2, 9)), plain_model(spec)(tokens(2, 9))) <= 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_the_start_follows_from_the_seed(method):
    def start(seed: int) -> dict[str, torch.Tensor]:
        model = build(spec_of())
        attached = attach(model, config_of(method), RandomWeights(spec_of()), seed=seed)
        return {name: attached.weights.read(name) for name in attached.added}

    first, again, other = start(1), start(1), start(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    has_random = method != "ia3"
    assert any(not torch.equal(first[name], other[name]) for name in first) == has_random


MESHES = {
    "dp_shard 2": MeshConfig(dp_shard=2),
    "dp_replicate 2": MeshConfig(dp_replicate=2),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mesh", MESHES)
def test_certified(method, mesh):
    plan = Plan(
        mesh=MESHES[mesh],
        peft=config_of(method),
        train=TrainConfig(sequence_length=24, tokens_per_step=24 * 12),
    )
    certificate = certify(plan)
    assert certificate.certified, certificate.worst
    assert BOUND == 1e-12
    added = added_tensors(spec_of(), config_of(method)).keys()
    moved = {name for name, entry in certificate.per_parameter.items() if entry["gradient"] > 0}
    # Sums in another order round, so that what has a gradient has an error; a few may have none.
    assert moved <= added
    assert len(moved) > 0.9 * len(added)


@pytest.mark.parametrize("family", ["gemma3", "gpt2", "mixtral"])
@pytest.mark.parametrize("method", METHODS)
def test_certified_on_one_rank_for_other_families(method, family):
    plan = Plan(
        peft=config_of(method), train=TrainConfig(sequence_length=32, tokens_per_step=32 * 6)
    )
    spec = spec_of(family)
    certificate = certify(plan, spec, RandomWeights(spec))
    assert certificate.certified, certificate.worst


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", MERGED)
def test_merged_is_attached(method, family):
    for dtype, bound in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        spec, config = spec_of(family), config_of(method)
        attached = adapted_model(spec, config, dtype)
        added = {name: value.to(dtype) for name, value in added_tensors(spec, config).items()}
        base = TensorWeights(
            {name: p.detach() for name, p in plain_model(spec, dtype).named_parameters()}
        )
        merged = build(spec, dtype)
        fill(merged, MergedWeights(spec, config, base, TensorWeights(added)), CPU)
        with torch.no_grad():
            expected, plain = attached(tokens(2, 19)), plain_model(spec, dtype)(tokens(2, 19))
            assert difference(expected, plain) > 0.1  # or the bound would say little
            assert difference(merged(tokens(2, 19)), expected) <= bound


@pytest.mark.parametrize("method", METHODS)
def test_what_cannot_be_merged_says_why(method):
    spec, config = spec_of(), config_of(method)
    tensors = TensorWeights(added_tensors(spec, config))
    if method in MERGED:
        MergedWeights(spec, config, RandomWeights(spec), tensors)
        return
    reason = method_of(config).why_unmerged
    with pytest.raises(Exception, match=f"peft.method = {method} cannot be merged: {reason}"):
        MergedWeights(spec, config, RandomWeights(spec), tensors)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_out_to_files_and_back(method, family, tmp_path):
    spec, config = spec_of(family), config_of(method)
    if family == "gpt2" and method in MERGED:
        config = replace(config, targets=("blocks.*.ffn.*", "blocks.1.attention.output"))
    tensors = added_tensors(spec, config)
    write_adapter(tmp_path, spec, config, "random:llama:tiny", tensors)
    assert {path.name for path in tmp_path.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    adapter = open_adapter(tmp_path, spec)
    expected = method_of(config).targets(build(spec))
    assert adapter.config == replace(config, targets=tuple(expected))
    assert adapter.tensors.keys() == tensors.keys()
    for name, value in tensors.items():
        assert torch.equal(adapter.tensors[name], value), name
