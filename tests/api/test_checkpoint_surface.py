"""A user's own module, saved under one plan and loaded under others: every bit is there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import paceline as pl
from paceline.checkpoint.load import load_whole
from paceline.checkpoint.manifest import read_manifest
from paceline.core.errors import DataError, UsageError
from paceline.dist.testing import run_ranks
from paceline.plan.mesh import MeshConfig
from paceline.plan.plan import Plan, TensorConfig, ZeroConfig

pytestmark = [pytest.mark.cpu, pytest.mark.ranks]


def tp(degree: int, **others: int) -> Plan:
    """Tensor ranks over a module, which keeps its residual stream whole."""
    tensor = TensorConfig(sequence_parallel=False)
    return Plan(mesh=MeshConfig(tp=degree, **others), tensor=tensor)


ALONE, SHARD_2 = Plan(), Plan(mesh=MeshConfig(dp_shard=2))
SIZES = {
    "gpt2": {"vocab_size": 61, "n_embd": 24, "n_layer": 2, "n_head": 6, "n_positions": 32}
    | {"n_inner": 27},
    "phi3": {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 27, "pad_token_id": None}
    | {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
}
"""Queries, keys and values in one matrix; of Phi-3 two key heads for four, gate and up in one."""
CHAINS = {
    "gpt2, tp 2 to tp 3 to one process": ("gpt2", (tp(2), tp(3), ALONE)),
    "gpt2, tp 3 to dp_shard 2": ("gpt2", (tp(3), SHARD_2)),
    "gpt2, dp_shard 2 to tp 2 x dp_shard 2": (
        "gpt2",
        (SHARD_2, tp(2, dp_shard=2)),
    ),
    "phi3, tp 4, which copies key heads, to tp 2 to one process": ("phi3", (tp(4), tp(2), ALONE)),
    "phi3, one process to dp_shard 4 to tp 2": (
        "phi3",
        (ALONE, Plan(mesh=MeshConfig(dp_shard=4)), tp(2)),
    ),
    "phi3, dp_shard 2, stage 0, to tp 4": (
        "phi3",
        (Plan(mesh=MeshConfig(dp_shard=2), zero=ZeroConfig(stage=0)), tp(4)),
    ),
}


def build(model: str, seed: int) -> nn.Module:
    import transformers

    torch.manual_seed(seed)
    names = {"gpt2": "GPT2Config", "phi3": "Phi3Config"}
    config = getattr(transformers, names[model])(**SIZES[model], bos_token_id=1, eos_token_id=2)
    module = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return module


def loss_of(module: nn.Module, step: int) -> torch.Tensor:
    tokens_BT = (torch.arange(24).view(2, 12) * 7 + step) % 61
    return module(input_ids=tokens_BT, labels=tokens_BT, use_cache=False).loss


def laid(model: str, plan: Plan, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    module = pl.parallelize(build(model, seed), plan)
    return module, torch.optim.AdamW(module.parameters(), lr=1e-2, eps=1e-4)


def on_ranks(work: Callable[[int], Any], plan: Plan) -> Any:
    """What the first of the plan's ranks gives."""
    if plan.mesh.num_ranks == 1:
        return work(0)
    return run_ranks(work, plan.mesh.num_ranks)[0]


@pytest.mark.parametrize("chain", CHAINS)
def test_a_module_has_the_same_bits_under_every_plan(tmp_path, chain):
    model, plans = CHAINS[chain]

    def begin(_rank: int) -> float:
        module, optimizer = laid(model, plans[0], 1)
        for step in range(2):
            loss_of(module, step).backward()
            optimizer.step()
            optimizer.zero_grad()
        pl.save_checkpoint(tmp_path / "0", 2, module, optimizer)
        return loss_of(module, 2).item()

    expected = on_ranks(begin, plans[0])
    whole = load_whole(tmp_path / "0" / "step-2", "")
    shapes = {name: tuple(p.shape) for name, p in build(model, 1).named_parameters()}
    for name, shape in shapes.items():
        keys = (f"model.{name}", f"optimizer.{name}.exp_avg", f"optimizer.{name}.exp_avg_sq")
        assert [tuple(whole[key].shape) for key in keys] == [shape] * 3
        assert whole[f"optimizer.{name}.step"] == 2
    for number, plan in enumerate(plans[1:], 1):

        def go_on(_rank: int, number: int = number, plan: Plan = plan) -> float:
            module, optimizer = laid(model, plan, 5)
            source = tmp_path / str(number - 1)
            assert pl.load_checkpoint(source, module, optimizer) == 2
            pl.save_checkpoint(tmp_path / str(number), 2, module, optimizer)
            return loss_of(module, 2).item()

        assert on_ranks(go_on, plan) == pytest.approx(expected, rel=1e-5)
        again = load_whole(tmp_path / str(number) / "step-2", "")
        assert again.keys() == whole.keys()
        for name, value in whole.items():
            assert torch.equal(again[name], value), name


def test_one_process_has_what_its_state_dict_has(tmp_path):
    module, optimizer = laid("gpt2", ALONE, 1)
    loss_of(module, 0).backward()
    optimizer.step()
    path = pl.save_checkpoint(tmp_path, 1, module, optimizer)
    whole = load_whole(path, "model.")
    names = {name for name, _ in module.named_parameters()}
    assert whole.keys() == {f"model.{name}" for name in names}
    for name, value in module.state_dict().items():
        if name in names:
            assert torch.equal(whole[f"model.{name}"], value)
    assert pl.load_checkpoint(path, *laid("gpt2", ALONE, 7)) == 1


def test_fused_matrices_say_what_is_in_them(tmp_path):
    def work(_rank: int) -> None:
        pl.save_checkpoint(tmp_path, 0, *laid("gpt2", tp(2), 1))

    on_ranks(work, tp(2))
    tensors = read_manifest(tmp_path / "step-0").tensors
    for name in ("model.{}", "optimizer.{}.exp_avg"):
        entry = tensors[name.format("transformer.h.0.attn.c_attn.weight")]
        assert entry.shape == (24, 72)
        assert [(p.box.offsets, p.box.sizes) for p in entry.pieces] == [
            ((0, 0), (24, 24)),
            ((0, 24), (24, 24)),
            ((0, 48), (24, 24)),
        ]
    assert tensors["model.transformer.h.0.mlp.c_fc.weight"].pieces == ()


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_an_optimizer_without_state_is_saved_as_it_begins(tmp_path, kind):
    """Saved before its first step, and loaded into one that has taken none: the runs agree."""

    def optimizer_of(module: nn.Module) -> torch.optim.Optimizer:
        if kind == "sgd":
            return torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)
        return torch.optim.AdamW(module.parameters(), lr=torch.tensor(0.01), weight_decay=0.1)

    def steps(module: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
        losses = []
        for step in range(3):
            loss = loss_of(module, step)
            loss.backward()
            losses.append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
        return losses

    plain = build("gpt2", 1)
    expected = steps(plain, optimizer_of(plain))
    saved = build("gpt2", 1)
    before = {name: value.clone() for name, value in saved.state_dict().items()}
    loss_of(saved, 9).backward()  # a gradient that is lying about stays
    optimizer = optimizer_of(saved)
    pl.save_checkpoint(tmp_path, 0, saved, optimizer)
    assert all(torch.equal(value, before[name]) for name, value in saved.state_dict().items())
    assert all(parameter.grad is not None for parameter in saved.parameters())
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.05 if kind == "sgd" else 0.01)
    optimizer.zero_grad()
    assert steps(saved, optimizer) == expected
    loaded = build("gpt2", 4)
    other = optimizer_of(loaded)
    assert pl.load_checkpoint(tmp_path, loaded, other) == 0
    assert steps(loaded, other) == expected


def test_what_cannot_be_saved_is_refused(tmp_path):
    module, optimizer = laid("gpt2", ALONE, 1)
    foreign = torch.optim.AdamW([nn.Parameter(torch.ones(2))])
    with pytest.raises(UsageError, match="has a parameter that is not the module's"):
        pl.save_checkpoint(tmp_path, 1, module, foreign)
    pl.save_checkpoint(tmp_path, 1, module, optimizer)
    first = next(module.parameters())
    optimizer.state[first]["row"] = torch.ones(3)
    with pytest.raises(UsageError, match=r"wte\.weight\.row is \[3\], its parameter \[61, 24\]"):
        pl.save_checkpoint(tmp_path, 2, module, optimizer)
    with pytest.raises(UsageError, match="holds no complete checkpoint"):
        pl.load_checkpoint(tmp_path / "nowhere", module, optimizer)
    with pytest.raises(DataError, match=r"only (this run|the checkpoint) has the tensor"):
        pl.load_checkpoint(tmp_path, *laid("phi3", ALONE, 1))


def test_a_module_that_is_not_laid_over_the_ranks_is_refused(tmp_path):
    def work(_rank: int) -> str:
        module = build("gpt2", 1)
        with pytest.raises(UsageError, match="GPT2LMHeadModel is not laid over ranks") as caught:
            pl.save_checkpoint(tmp_path, 1, module, torch.optim.AdamW(module.parameters()))
        return caught.value.hint

    assert run_ranks(work, 2) == ["paceline.parallelize(module, plan) first"] * 2
    assert list(Path(tmp_path).iterdir()) == []
