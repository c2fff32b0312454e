"""Rules of number formats, compiled blocks and fine-tuning."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

from paceline.core.errors import Problem
from paceline.plan.plan import PeftConfig, Plan, PrecisionConfig
from paceline.plan.rules.known import Known, schedule_of
from paceline.plan.rules.pipeline import whole_schedules

PEFT_KEYS: dict[str, tuple[str, ...]] = {
    "targets": ("lora", "dora", "ia3", "bottleneck"),
    "rank": ("lora", "dora"),
    "alpha": ("lora", "dora"),
    "virtual_tokens": ("prefix", "prompt"),
    "width": ("bottleneck",),
}
"""Key of ``[peft]`` to the methods that read it."""


def one_float64(known: Known) -> Iterator[Problem]:
    """float64 is for all numbers, or none."""
    precision = known.plan.precision
    values = {field.name: getattr(precision, field.name) for field in fields(PrecisionConfig)}
    wide = [name for name, value in values.items() if value == "float64"]
    if wide and len(wide) < len(values):
        others = " and ".join(f"precision.{name}" for name in values if name not in wide)
        hint = f'use "float64" for {others} too, or "float32" for all'
        rule = "float64 is for params, compute and reduce alike"
        yield known.problem(f"precision.{wide[0]}", rule, hint)


def compiled_whole(known: Known) -> Iterator[Problem]:
    """Blocks are compiled where they are whole, and so are their backward passes."""
    if known.plan.train.compile == "on":
        for way in _ways_of_splitting(known.plan):
            rule = f"has not been proved with {way}"
            yield known.problem("train.compile", rule, 'use "auto" or "off"')


def peft_whole(known: Known) -> Iterator[Problem]:
    """Fine-tuning is proved where blocks are whole, and so are their backward passes."""
    if known.plan.peft.method != "none":
        for way, instead in _ways_of_splitting(known.plan).items():
            hint = f'set {instead}, or peft.method = "none"'
            yield known.problem("peft.method", f"has not been proved with {way}", hint)


def _ways_of_splitting(plan: Plan) -> dict[str, str]:
    """How a plan splits blocks or backward passes: each way, and what does not."""
    axes = [axis for axis in ("pp", "cp", "tp", "ep") if getattr(plan.mesh, axis) > 1]
    ways = {f"mesh.{axis} > 1": f"mesh.{axis} = 1" for axis in axes}
    if schedule_of(plan.pipeline.schedule).splits_backward:
        way = f"{plan.pipeline.schedule}, which splits backward passes"
        ways[way] = f"pipeline.schedule to {whole_schedules()}"
    return ways


def frozen_once(known: Known) -> Iterator[Problem]:
    """Fine-tuning freezes the model itself."""
    method = known.plan.peft.method
    if method != "none" and known.plan.train.freeze:
        rule = f"does not go with peft.method = {method}, which freezes the whole model"
        yield known.problem("train.freeze", rule, "leave it out; peft.targets chooses layers")


def peft_options(known: Known) -> Iterator[Problem]:
    """Options of fine-tuning belong to methods."""
    peft, unset = known.plan.peft, PeftConfig()
    for key, methods in PEFT_KEYS.items():
        if peft.method not in methods and getattr(peft, key) != getattr(unset, key):
            rule = f"is not read by peft.method = {peft.method}"
            yield known.problem(f"peft.{key}", rule, f"it is for {', '.join(methods)}")
