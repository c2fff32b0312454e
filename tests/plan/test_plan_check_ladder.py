"""What a ladder residual does not go with, and the way out."""

from __future__ import annotations

from dataclasses import replace

import pytest

from paceline.models.families.llama import PRESETS
from paceline.models.families.mixtral import PRESETS as MIXTRAL
from paceline.plan.check import check
from paceline.plan.plan import Plan

LADDER = replace(PRESETS["tiny"], ladder_from=1)
WHOLE = "tensor.sequence_parallel=false"


def problems(spec, *settings: str) -> dict[str, tuple[str, str]]:
    plan = Plan().with_overrides([*settings, "pipeline.num_microbatches=4"])
    return {problem.path: (problem.rule, problem.hint) for problem in check(plan, spec)}


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("mesh.tp=2", WHOLE),
        ("mesh.tp=3", "mesh.dp_shard=2", WHOLE),
        ("memory.remat=full", "mesh.dp_replicate=2"),
        ("peft.method=lora",),
    ],
)
def test_what_goes_with_it(settings):
    assert problems(LADDER, *settings) == {}


@pytest.mark.parametrize(
    ("spec", "settings", "path", "rule", "hint"),
    [
        (LADDER, ("mesh.pp=2",), "mesh.pp", "an output under way between its layers", "use 1"),
        (LADDER, ("mesh.tp=2",), "tensor.sequence_parallel", "whose sums are whole", "to false"),
        (
            replace(MIXTRAL["tiny"], ladder_from=0),
            ("mesh.tp=2", WHOLE),
            "mesh.tp",
            "has not been proved with experts in a ladder residual",
            "use 1",
        ),
    ],
    ids=["pipeline", "tokens split", "experts"],
)
def test_what_does_not(spec, settings, path, rule, hint):
    found = problems(spec, *settings)
    assert list(found) == [path]
    assert rule in found[path][0]
    assert hint in found[path][1]
    assert problems(replace(spec, ladder_from=None), *settings) == {}
