"""Rules of stages and schedules."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from itertools import pairwise

from paceline.core.errors import Problem
from paceline.plan.rules.known import Known, schedule_of


def stages_per_rank(known: Known) -> Iterator[Problem]:
    """A schedule has so many stages on a rank."""
    pipeline = known.plan.pipeline
    schedule, count = schedule_of(pipeline.schedule), pipeline.stages_per_rank
    least, most = schedule.min_stages_per_rank, schedule.max_stages_per_rank
    if count < least or (most is not None and count > most):
        legal = f"{least}" if least == most else f"{least} or more"
        rule = f"does not go with {pipeline.schedule}, which takes {legal} a rank"
        yield known.problem("pipeline.stages_per_rank", rule, f"use {legal}")


def stages_have_layers(known: Known) -> Iterator[Problem]:
    """Every stage has a layer."""
    pp, per_rank = known.plan.mesh.pp, known.plan.pipeline.stages_per_rank
    if known.spec is None or pp * per_rank <= known.spec.num_layers:
        return
    num_layers = known.spec.num_layers
    rule = f"makes {pp * per_rank} stages, but the model has {num_layers} layer(s)"
    if per_rank <= num_layers:
        hint = f"use at most {num_layers // per_rank}"
    elif pp <= num_layers:
        hint = f"set pipeline.stages_per_rank = {num_layers // pp}"
    else:
        hint = f"use 1, and at most {num_layers} for pipeline.stages_per_rank"
    yield known.problem("mesh.pp", rule, hint)


def stage_cuts(known: Known) -> Iterator[Problem]:
    """Cuts are as many as the stages want, in order."""
    pipeline = known.plan.pipeline
    cuts, num_stages = pipeline.stage_cuts, known.plan.mesh.pp * pipeline.stages_per_rank
    if cuts is None:
        return
    path, hint = "pipeline.stage_cuts", "leave it out: stages of even cost"
    if len(cuts) != num_stages - 1:
        rule = f"must have one cut less than there are stages, {num_stages - 1}"
        yield known.problem(path, rule, hint)
    num_layers = math.inf if known.spec is None else known.spec.num_layers
    if not all(low < high for low, high in pairwise((0, *cuts, num_layers))):
        end = "" if known.spec is None else f" to {num_layers - 1}"
        yield known.problem(path, f"must increase, from 1{end}", hint)


def vocabulary_spreads(known: Known) -> Iterator[Problem]:
    """Words are spread over the ranks of a pipeline, each of which has some of them."""
    pipeline, mesh, path = known.plan.pipeline, known.plan.mesh, "pipeline.vocabulary"
    if pipeline.vocabulary == "edges":
        if pipeline.vocabulary_barriers != 1:
            rule = "is for words that are spread, and they are on the edge stages"
            hint = 'leave it out, or set pipeline.vocabulary = "spread"'
            yield known.problem("pipeline.vocabulary_barriers", rule, hint)
        return
    if mesh.pp == 1:
        rule = "spreads words over mesh.pp ranks, of which there is one"
        yield known.problem(path, rule, 'set mesh.pp = 2 or more, or use "edges"')
    if mesh.tp > 1:
        rule = "has not been proved with mesh.tp > 1, which splits words too"
        yield known.problem(path, rule, 'set mesh.tp = 1, or use "edges"')
    if known.spec is not None and mesh.pp > known.spec.vocab_size:
        rule = f"exceeds the model's {known.spec.vocab_size} words, which are spread"
        yield known.problem("mesh.pp", rule, f"use at most {known.spec.vocab_size}")


def split_backward(known: Known) -> Iterator[Problem]:
    """Weight passes of their own need the weights as they are, long after the input pass."""
    plan, path = known.plan, "pipeline.schedule"
    if not schedule_of(plan.pipeline.schedule).splits_backward:
        return
    if plan.zero_technique == "3":
        rule = "splits backward passes, of which torch's ZeRO stage 3 wants each in one piece"
        yield known.problem(path, rule, f'set zero.sharder = "own", or use {whole_schedules()}')


def whole_schedules() -> str:
    """The schedules that do not split backward passes."""
    table = importlib.import_module("paceline.parallel.pipeline").SCHEDULES
    return ", ".join(name for name in table if not schedule_of(name).splits_backward)
