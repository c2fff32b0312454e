"""Rules of what a step reads: ranks, sequences, micro-batches."""

from __future__ import annotations

from collections.abc import Iterator

from paceline.core.errors import Problem
from paceline.plan.batch import batch_shape
from paceline.plan.mesh import AXES
from paceline.plan.plan import Plan
from paceline.plan.rules.basic import NOT_BUILT
from paceline.plan.rules.known import Known, nearest, schedule_of


def ranks(known: Known) -> Iterator[Problem]:
    """The mesh has as many ranks as there are."""
    mesh, there = known.plan.mesh, known.num_ranks
    need = mesh.num_ranks
    if there is None or there == need:
        return
    degrees = " x ".join(f"{axis} {getattr(mesh, axis)}" for axis in AXES)
    rule = f"{degrees} needs {need} rank(s), but there are {there}"
    others = {axis: need // getattr(mesh, axis) for axis in AXES if f"mesh.{axis}" not in NOT_BUILT}
    fits = {axis: there // rest for axis, rest in others.items() if there % rest == 0}
    settings = [f"mesh.{axis} = {degree}" for axis, degree in fits.items()]
    change = f"set {' or '.join(settings)}" if settings else "change [mesh]"
    yield Problem("mesh", str(need), rule, f"start {need} rank(s), or {change}")


def _sequences(plan: Plan) -> list[int]:
    """Sequences of a data rank's step: one number, or the two nearest where it is not whole."""
    count = plan.train.tokens_per_step // _tokens_of_sequences(plan)
    return [n for n in ([count, count + 1] if _tokens_left_over(plan) else [count]) if n]


def _tokens_left_over(plan: Plan) -> int:
    """Tokens of a step that make no whole sequences on all data ranks."""
    return plan.train.tokens_per_step % _tokens_of_sequences(plan)


def _tokens_of_sequences(plan: Plan) -> int:
    """Tokens of one sequence on every data rank."""
    return plan.train.sequence_length * plan.mesh.num_data_ranks


def whole_sequences(known: Known) -> Iterator[Problem]:
    """A step is as many whole sequences on every data rank."""
    unit = _tokens_of_sequences(known.plan)
    if _tokens_left_over(known.plan):
        near = " or ".join(str(n * unit) for n in _sequences(known.plan))
        rule = f"must be a multiple of sequence_length x data ranks = {unit}"
        yield known.problem("train.tokens_per_step", rule, f"use {near}")


def whole_microbatches(known: Known) -> Iterator[Problem]:
    """A rank's step is as many sequences in every micro-batch."""
    count, sequences = known.plan.pipeline.num_microbatches, _sequences(known.plan)
    if count is not None and all(number % count for number in sequences):
        numbers = " or ".join(map(str, sequences))
        rule = f"must divide the {numbers} sequences of a rank's step"
        near = nearest(count, _microbatch_counts(known.plan) or _microbatch_counts(known.plan, 1))
        yield known.problem("pipeline.num_microbatches", rule, f"use {near}")


def _microbatch_counts(plan: Plan, unit: int | None = None) -> list[int]:
    """Numbers of micro-batches that divide the sequences of a step.

    Args:
        plan: whose step it is.
        unit: what they are to be a multiple of; by default the schedule's.
    """
    step: int = unit or schedule_of(plan.pipeline.schedule).microbatch_unit(plan.mesh.pp)
    sequences = _sequences(plan)
    candidates = range(step, max(sequences) + 1, step)
    return [n for n in candidates if any(number % n == 0 for number in sequences)]


def whole_rounds(known: Known) -> Iterator[Problem]:
    """A schedule may take its micro-batches in rounds of as many as there are pipeline ranks."""
    plan = known.plan
    unit = schedule_of(plan.pipeline.schedule).microbatch_unit(plan.mesh.pp)
    count = plan.pipeline.num_microbatches
    if count is None and not _tokens_left_over(plan):
        count = batch_shape(plan).num_microbatches
    if count is not None and count % unit:
        rule = f"{plan.pipeline.schedule} takes multiples of mesh.pp = {unit}, not {count}"
        legal = _microbatch_counts(plan)
        other = f"make train.tokens_per_step a multiple of {unit * _tokens_of_sequences(plan)}"
        hint = f"use {nearest(count, legal)}" if legal else other
        yield known.problem("pipeline.num_microbatches", rule, hint)


def context_fits(known: Known) -> Iterator[Problem]:
    """A sequence, and what is put before it, fits the model's context."""
    if known.spec is None:
        return
    virtual, limit = known.plan.peft.num_virtual_tokens, known.spec.max_positions
    if known.plan.train.sequence_length + virtual > limit:
        behind = f", behind {virtual} virtual tokens," if virtual else ""
        rule = f"exceeds{behind} the model's context of {limit} tokens"
        is_room = limit > virtual
        hint = f"use at most {limit - virtual}" if is_room else "use fewer peft.virtual_tokens"
        yield known.problem("train.sequence_length", rule, hint)
