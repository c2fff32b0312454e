"""The harness of mutation tests: a table of deliberate defects, each of which `certify` must catch.

A defect is a patch that is applied inside the forked ranks alone, so the oracle stays right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, Literal

import pytest
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from paceline.core.errors import RankError
from paceline.dist.world import World
from paceline.memory.remat import full
from paceline.memory.remat.base import Remat
from paceline.models.families.llama import PRESETS
from paceline.models.weights import RandomWeights
from paceline.optim.scale import LossScale, clip, global_norm
from paceline.parallel import apply as apply_module
from paceline.parallel.tensor.decoder import SplitDecoder
from paceline.plan.mesh import MeshConfig
from paceline.plan.model_spec import ModelSpec
from paceline.plan.plan import (
    MemoryConfig,
    PipelineConfig,
    Plan,
    TensorConfig,
    TrainConfig,
    ZeroConfig,
)
from paceline.train import step as step_module
from paceline.verify import certify as certify_module
from paceline.verify.certify import BOUND, CASES, Certificate, certify

Patch = pytest.MonkeyPatch
Mutant = Callable[[Patch, int], None]
"""Patches this process, which is the given rank."""

PACKED, PADDED = CASES

SPEC = ModelSpec(
    family="llama",
    vocab_size=43,
    d_model=24,
    num_layers=2,
    num_heads=3,
    num_kv_heads=1,
    head_dim=8,
    d_ffn=40,
    max_positions=32,
    tied_embeddings=True,
)
UNEVEN = replace(
    PRESETS["tiny"],
    vocab_size=43,
    d_model=24,
    num_layers=2,
    num_heads=6,
    num_kv_heads=3,
    head_dim=4,
    d_ffn=37,
    max_positions=32,
    qk_norm="head",
    qkv_bias=True,
    output_bias=True,
    ffn_bias=True,
)
"""On two ranks three key heads make one that both have, and six query heads that are no groups of
equal size; 43 words and 37 columns make unequal shares, 17 tokens a row of padding.
"""


@dataclass(frozen=True, slots=True)
class Defect:
    """One entry of a table.

    Attributes:
        plan: whose ranks have it.
        spec: of the model.
        case: of the certificate; one must be enough to show it.
        mutate: puts it in.
        error: what a rank says, where the defect does not get as far as a certificate.
    """

    plan: Plan
    spec: ModelSpec
    case: str
    mutate: Mutant
    error: str | None = None


class Defects(dict[str, Defect]):
    """A table by name.

    Args:
        spec: of the model of every defect that names none.
        case: of every defect that names none.
    """

    def __init__(self, spec: ModelSpec, case: str = PADDED) -> None:
        super().__init__()
        self._spec, self._case = spec, case

    def of(
        self,
        plan: Plan,
        case: str | None = None,
        *,
        spec: ModelSpec | None = None,
        error: str | None = None,
    ) -> Callable[[Mutant], Mutant]:
        """Adds what it decorates, under its name."""

        def add(mutate: Mutant) -> Mutant:
            assert mutate.__name__ not in self, "two defects of one name"
            found = Defect(plan, spec or self._spec, case or self._case, mutate, error)
            self[mutate.__name__] = found
            return mutate

        return add


def plan_of(
    *,
    length: int = 16,
    sequences: int = 12,
    pipeline: PipelineConfig | None = None,
    sequence_parallel: bool = True,
    zero: ZeroConfig | None = None,
    remat: Literal["none", "selective", "full"] = "none",
    **degrees: int,
) -> Plan:
    """A plan over few ranks, three micro-batches a step, so small that a defect takes no time."""
    return Plan(
        mesh=MeshConfig(**degrees),
        zero=zero or ZeroConfig(),
        tensor=TensorConfig(sequence_parallel=sequence_parallel),
        pipeline=pipeline or PipelineConfig(num_microbatches=3),
        memory=MemoryConfig(remat=remat),
        train=TrainConfig(sequence_length=length, tokens_per_step=length * sequences),
    )


def nothing(_patch: Patch, _rank: int) -> None:
    """No defect."""


def certify_with(
    monkeypatch: Patch, plan: Plan, spec: ModelSpec, mutate: Mutant, *cases: str
) -> Certificate:
    """What the ranks of a plan get once each of them has been patched."""
    monkeypatch.setattr(certify_module, "CASES", {case: CASES[case] for case in cases})
    original = certify_module._compare

    def compare(case: str, plan: Plan, *arguments: Any) -> Any:
        world = next(argument for argument in arguments if isinstance(argument, World))
        mutate(monkeypatch, world.rank)  # in a fork: the parent never sees it
        return original(case, plan, *arguments)

    monkeypatch.setattr(certify_module, "_compare", compare)
    return certify(plan, spec, RandomWeights(spec, seed=2))


def assert_caught(monkeypatch: Patch, defect: Defect) -> None:
    """The certificate shows the defect, or a rank names it."""
    with _expected(defect.error):
        certificate = certify_with(
            monkeypatch, defect.plan, defect.spec, defect.mutate, defect.case
        )
        errors = (
            certificate.max_rel_grad_error,
            certificate.max_rel_param_error,
            certificate.loss_error,
        )
        assert not certificate.certified
        assert max(errors) > 10 * BOUND, errors  # a defect, not a matter of rounding


def leave_out(
    patch: Patch, field: Literal["partial", "copied"], is_left_out: Callable[[str], bool]
) -> None:
    """Leaves parameters out of those whose gradients `SplitDecoder` makes to sums.

    Args:
        patch: of this rank.
        field: of `SplitDecoder`.
        is_left_out: by a parameter's name.
    """
    original = apply_module.split

    def split(*arguments: Any, **options: Any) -> SplitDecoder:
        found = original(*arguments, **options)
        kept = frozenset(name for name in getattr(found, field) if not is_left_out(name))
        return replace(found, **{field: kept})

    patch.setattr(apply_module, "split", split)


def clip_by_own_norm(patch: Patch) -> None:
    """Has every rank clip by the norm of what it has, and report the whole one."""
    worlds: list[World] = []

    def remember(parts: Any, axes: Any, world: World) -> float:
        worlds.append(world)
        return global_norm(parts, axes, world)

    def own_clip(parts: Any, norm: float, max_norm: float) -> float:
        clip(parts, global_norm(parts, (), worlds[-1]), max_norm)
        return min(1.0, max_norm / norm)

    patch.setattr(step_module, "global_norm", remember)
    patch.setattr(step_module, "clip", own_clip)


def count_tokens_along(patch: Patch, axis: str) -> None:
    """Counts a step's tokens once for every rank of an axis whose ranks read the same."""
    original = LossScale.__init__

    def init(self: LossScale, local_count: int, world: World) -> None:
        original(self, local_count, world)
        self.count *= world.degree(axis)

    patch.setattr(LossScale, "__init__", init)


def recompute_from(patch: Patch, factor: float) -> None:
    """Has blocks computed again from their input times a factor."""

    def around(function: Any, x: Tensor, *others: Any) -> Any:
        calls = count()

        def run(x: Tensor) -> Any:
            return function(x if next(calls) == 0 else factor * x, *others)

        return checkpoint(run, x, use_reentrant=False, preserve_rng_state=False)

    patch.setattr(full, "FULL", Remat(around_block=around))


@contextmanager
def _expected(error: str | None) -> Iterator[None]:
    if error is None:
        yield
        return
    with pytest.raises(RankError, match=error):
        yield
