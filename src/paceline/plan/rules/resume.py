"""Rules of going on with a run: what may change of its plan, and what its state stands on."""

from __future__ import annotations

import json
from collections.abc import Iterator

from paceline.core.errors import Problem
from paceline.plan.difference import changed_keys
from paceline.plan.plan import Plan
from paceline.plan.rules.known import value_at

MAY_CHANGE = (
    "mesh",
    "zero",
    "tensor",
    "pipeline",
    "context",
    "expert",  # the weight of a loss, as that of decay, is a matter of the steps to come
    "memory",
    "precision.compute",
    "precision.reduce",
    "train.microbatch_tokens",
    "train.eval_interval_steps",
    "train.eval_tokens",
    "train.compile",
    "optimizer.lr",  # lower, where training has diverged
    "optimizer.eps",
    "optimizer.weight_decay",
    "optimizer.clip_norm",
    "optimizer.schedule",
    "checkpoint",
    "resilience",
    "serve",
)
"""Keys, and tables with all of their keys, that the run's data and state do not stand on."""

_ORDER = "decides which tokens a step reads"
_LOSS = "decides what has a loss"
_STATE = "decides what the checkpoint holds"

FIXED: dict[str, str] = {
    "train.sequence_length": _ORDER,
    "train.tokens_per_step": _ORDER,
    "train.seed": _ORDER,
    "train.pack": _ORDER,
    "train.long_documents": _ORDER,
    "train.answers_only": _LOSS,
    "train.freeze": _STATE,
    "peft": _STATE,
    "precision.params": _STATE,
    "replicas.method": _STATE,
    "optimizer.name": _STATE,
    "optimizer.betas": "decides what the optimizer's moments are means of",
}
"""Keys, and tables with all of their keys, that must stay as they are, to the reason."""


def fixed_keys_stay(before: Plan, after: Plan) -> Iterator[Problem]:
    """What the data and the state of a run stand on does not change as it goes on.

    Args:
        before: the run's plan.
        after: what is to be in force from now on.
    """
    for path, value in changed_keys(before, after).items():
        if (why := _reason(path)) is not None:
            old = _text(value_at(before, path))
            hint = f"leave it at {old}, or begin a new run from an export: "
            rule = f"{why}, and is {old} in this run"
            yield Problem(path, _text(value), rule, hint + "paceline checkpoint export")


def _reason(path: str) -> str | None:
    """Why a key must stay; None if it may change. A key in neither table stays."""
    if any(_covers(key, path) for key in MAY_CHANGE):
        return None
    found = [why for key, why in FIXED.items() if _covers(key, path)]
    return found[0] if found else "has not been proved to be free to change"


def _covers(key: str, path: str) -> bool:
    return path == key or path.startswith(f"{key}.")


def _text(value: object) -> str:
    return "(absent)" if value is None else json.dumps(value)
