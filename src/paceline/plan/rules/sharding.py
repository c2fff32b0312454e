"""Rules of how ranks share state and matrices."""

from __future__ import annotations

from collections.abc import Iterator

from paceline.core.errors import Problem
from paceline.plan.rules.known import Known


def zero_needs_shards(known: Known) -> Iterator[Problem]:
    """A stage of ZeRO is for ranks that share state."""
    if known.plan.zero.stage and known.plan.mesh.dp_shard == 1:
        rule = "shares state over dp_shard ranks, of which there is one"
        yield known.problem("zero.stage", rule, "set mesh.dp_shard = 2 or more, or zero.stage = 0")


def sharder_fits(known: Known) -> Iterator[Problem]:
    """Stage 3 alone has sharders, and torch's wants each backward pass in one piece."""
    sharder, path = known.plan.zero.sharder, "zero.sharder"
    if sharder != "auto" and known.plan.zero_stage != 3:
        rule = f"is for stage 3, and the stage in force is {known.plan.zero_stage}"
        yield known.problem(path, rule, "leave it out, or set zero.stage = 3")
    elif sharder == "torch" and known.plan.mesh.pp > 1:
        rule = "does not go with mesh.pp > 1, whose backward passes come in parts"
        yield known.problem(path, rule, 'use "own"')


def tensor_has_ranks(known: Known) -> Iterator[Problem]:
    """How tensor ranks split tokens is for tensor ranks."""
    if known.plan.mesh.tp == 1 and not known.plan.tensor.sequence_parallel:
        rule = "says how mesh.tp ranks share, which is 1"
        yield known.problem(
            "tensor.sequence_parallel", rule, "set mesh.tp = 2 or more, or leave it out"
        )


def tensor_fits(known: Known) -> Iterator[Problem]:
    """Every rank has something of each matrix that is split."""
    yield from tensor_limits(known, "mesh.tp", known.plan.mesh.tp)


def tensor_limits(known: Known, path: str, degree: int) -> Iterator[Problem]:
    """What a model sets to a degree of tensor parallelism, which stands at a path of the plan."""
    spec = known.spec
    if degree == 1 or spec is None:
        return
    if spec.qk_norm == "all" and spec.norm == "layer":
        yield known.problem(path, "cannot split a layer norm over all heads", "use 1")
        return
    sizes = {
        "query heads": spec.num_heads,
        "columns of the feed-forward": spec.d_ffn,
        "words of the vocabulary": spec.vocab_size,
    }
    if spec.moe is not None and spec.moe.d_shared:
        sizes["columns of what all tokens share"] = spec.moe.d_shared
    for what, most in sizes.items():
        if degree > most:
            rule, hint = f"exceeds the model's {most} {what}", f"use at most {min(sizes.values())}"
            yield known.problem(path, rule, hint)


def ladder_fits(known: Known) -> Iterator[Problem]:
    """Between a ladder's layers goes an output that is under way; in its sums, whole tokens."""
    plan, spec = known.plan, known.spec
    if spec is None or spec.ladder_from is None:
        return
    if plan.mesh.pp > 1:
        rule = "cuts a model whose ladder residual has an output under way between its layers"
        yield known.problem("mesh.pp", rule, "use 1; mesh.tp and mesh.dp_shard split it too")
    if plan.mesh.tp > 1 and plan.tensor.sequence_parallel:
        rule = "splits the tokens of a residual stream that is a ladder, whose sums are whole"
        yield known.problem("tensor.sequence_parallel", rule, "set it to false")
    if plan.mesh.tp > 1 and spec.moe is not None:
        rule = "has not been proved with experts in a ladder residual"
        yield known.problem("mesh.tp", rule, "use 1")
