"""A model over shared sequences: what is summed, what is computed again, what is kept."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from paceline.data.batch import IGNORED, Batch
from paceline.dist.testing import run_ranks
from paceline.dist.world import World
from paceline.models.families.llama import PRESETS
from paceline.models.layout import PADDING
from paceline.models.weights import RandomWeights
from paceline.parallel.apply import apply
from paceline.parallel.context import METHODS, blocks
from paceline.parallel.context.share import GRADIENTS, SharedSequences
from paceline.plan.mesh import MeshConfig
from paceline.plan.plan import ContextConfig, MemoryConfig, Plan, PrecisionConfig, ZeroConfig
from paceline.train.objective.next_token import next_token

pytestmark = [pytest.mark.cpu, pytest.mark.ranks]

SPEC = replace(PRESETS["tiny"], num_layers=2)
B, T = 2, 16
CPU = torch.device("cpu")


def batch() -> Batch:
    tokens_BT = (torch.arange(B * T).view(B, T) * 7) % SPEC.vocab_size
    return Batch(tokens_BT, tokens_BT.roll(-1, 1), torch.zeros(B, T, dtype=torch.int64))


def step(plan: Plan) -> list[dict[str, Any]]:
    """A step of a plan's ranks: calls of the block kernel, bytes by purpose, and gradients."""
    precision = PrecisionConfig(params="float64", compute="float64", reduce="float64")
    plan = replace(plan, precision=precision)

    def work(rank: int) -> dict[str, Any]:
        calls: Counter[str] = Counter()
        for name in ("attend_block", "attend_block_backward"):
            original = getattr(blocks, name)

            def counted(*arguments, name=name, original=original, **options):
                calls[name] += 1
                return original(*arguments, **options)

            setattr(blocks, name, counted)
        world = World(plan.mesh, rank, CPU)
        model = apply(SPEC, RandomWeights(SPEC, seed=3), plan, world)
        model.passes.train([batch()], next_token, lambda loss: loss)
        model.finish_gradients()
        sent: Counter[str] = Counter()
        for operation, _, size_bytes, purpose in world.traffic.transfers:
            if operation != "receive":
                sent[purpose] += size_bytes
        gradients = {name: part.ensured_gradient().numpy() for name, part in model.parts.items()}
        return {"calls": dict(calls), "sent": dict(sent), "gradients": gradients}

    return run_ranks(work, plan.mesh.num_ranks)


def plan_of(method: Any, remat: Any, *, cp: int = 2) -> Plan:
    return Plan(
        mesh=MeshConfig(cp=cp),
        context=ContextConfig(method=method),
        memory=MemoryConfig(remat=remat),
    )


@pytest.mark.parametrize("method", METHODS)
def test_kept_attention_is_neither_computed_nor_sent_again(method):
    """Block calls and bytes of a run that computes nothing again; with `full` both are more."""
    remats = ("none", "full-keep-attention", "full")
    plain, kept, full = (step(plan_of(method, remat)) for remat in remats)
    for a, b, c in zip(plain, kept, full, strict=True):
        assert a["calls"] == b["calls"]
        assert a["sent"] == b["sent"]
        assert c["calls"]["attend_block"] == 2 * a["calls"]["attend_block"]
        assert c["calls"]["attend_block_backward"] == a["calls"]["attend_block_backward"]
        assert sum(c["sent"].values()) > sum(a["sent"].values())
        for name, gradient in a["gradients"].items():
            assert (gradient == b["gradients"][name]).all(), name  # the same bits
            assert (gradient == c["gradients"][name]).all(), name


def test_what_is_computed_again_is_sent_again():
    plain, full = (step(plan_of("ring", remat))[0]["sent"] for remat in ("none", "full"))
    keys = B * T // 2 * 2 * SPEC.d_kv * 8 * SPEC.num_layers
    assert full["keys and values"] - plain["keys and values"] == keys


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_gradients_of_parts_are_summed_once(stage):
    """So of as much as a rank holds once data ranks have summed."""
    mesh = MeshConfig(cp=2) if stage == 0 else MeshConfig(cp=2, dp_shard=2)
    found = step(Plan(mesh=mesh, zero=ZeroConfig(stage=stage)))
    for of_rank in found:
        held_bytes = sum(gradient.nbytes for gradient in of_rank["gradients"].values())
        assert of_rank["sent"][GRADIENTS] == held_bytes
    if stage:
        assert sum(f["sent"][GRADIENTS] for f in found) == 2 * SPEC.num_parameters * 8


def test_ranks_have_equally_many_tokens_whatever_the_length():
    documents_BT = torch.tensor([[0] * 5 + [1] * 2, [0] * 6 + [PADDING]])
    tokens_BT = torch.arange(14).view(2, 7) + 1
    labels_BT = tokens_BT.where(documents_BT != PADDING, IGNORED)
    whole = Batch(tokens_BT, labels_BT, documents_BT)

    def share(rank: int) -> tuple[Any, ...]:
        world = World(MeshConfig(cp=2), rank, CPU)
        part = SharedSequences(Plan(mesh=MeshConfig(cp=2)), world).share(whole)
        assert part.places_T is not None
        tensors = part.tokens_BT, part.labels_BT, part.documents_BT, part.places_T
        return tuple(x.numpy() for x in tensors)

    ranks = run_ranks(share, 2)
    assert [places.tolist() for *_, places in ranks] == [[0, 1, 6, 7], [2, 3, 4, 5]]
    for tokens, labels, documents, places in ranks:
        padded = torch.nn.functional.pad(tokens_BT, (0, 1))[:, places]
        assert (tokens == padded.numpy()).all()
        assert (labels[:, places == 7] == IGNORED).all()
        assert documents.shape == (2, 8)
        assert (documents[:, :7] == documents_BT.numpy()).all()
        assert (documents[:, 7] == PADDING).all()
