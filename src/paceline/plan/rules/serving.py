"""Rules of an engine over ranks."""

from __future__ import annotations

from collections.abc import Iterator

from paceline.core.errors import Problem
from paceline.plan.rules.known import Known
from paceline.plan.rules.sharding import tensor_limits


def serving_tensor_fits(known: Known) -> Iterator[Problem]:
    """Every rank of an engine has something of each matrix that is split."""
    yield from tensor_limits(known, "serve.mesh.tp", known.plan.serve.mesh.tp)
    spec = known.spec
    if spec is None or spec.ladder_from is None:
        return
    if known.plan.serve.mesh.tp > 1 and spec.moe is not None:
        rule = "has not been proved with experts in a ladder residual"
        yield known.problem("serve.mesh.tp", rule, "use 1")


def serving_stages_have_layers(known: Known) -> Iterator[Problem]:
    """Every stage of an engine has a layer."""
    stages, spec, path = known.plan.serve.mesh.pp, known.spec, "serve.mesh.pp"
    if stages == 1 or spec is None:
        return
    if spec.ladder_from is not None:
        rule = "cuts a model whose ladder residual has an output under way between its layers"
        yield known.problem(path, rule, "use 1; serve.mesh.tp splits it too")
    elif stages > spec.num_layers:
        rule = f"makes {stages} stages, but the model has {spec.num_layers} layer(s)"
        yield known.problem(path, rule, f"use at most {spec.num_layers}")


def proved_over_ranks(known: Known) -> Iterator[Problem]:
    """What an engine of one process may do and one of several has not been proved to."""
    serve = known.plan.serve
    if serve.mesh.num_ranks == 1:
        return
    hint = "set serve.mesh.tp = 1 and serve.mesh.pp = 1, or {}"
    if serve.batch_invariant:
        rule = "has not been proved over ranks, whose sums are in another order"
        yield known.problem("serve.batch_invariant", rule, hint.format("leave it out"))
    if serve.weights != "auto":
        rule = "has not been proved over ranks"
        yield known.problem("serve.weights", rule, hint.format('use "auto"'))
    if serve.draft not in ("none", "auto"):
        rule = "has not been proved over ranks"
        yield known.problem("serve.draft", rule, hint.format('use "none"'))
