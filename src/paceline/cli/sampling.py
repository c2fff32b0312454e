"""Flags of the verbs that generate, and the engine that they ask."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from paceline.cli.options import read_plan, require_dtype
from paceline.core.errors import UsageError

if TYPE_CHECKING:
    from paceline.decode.sampler import SamplingParams
    from paceline.serve.engine import Engine

MaxTokens = Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)]
Temperature = Annotated[float, typer.Option(help="0 takes the most likely token.", min=0.0)]
TopP = Annotated[float, typer.Option(help="Keep the most likely tokens up to this probability.")]
TopK = Annotated[int, typer.Option(help="Keep this many of the most likely tokens; 0: all.", min=0)]
Seed = Annotated[int | None, typer.Option(help="Of the sampling; random unless given.")]
Adapter = Annotated[
    Path | None, typer.Option(help="Folder of an adapter for MODEL, as `peft` or we save it.")
]
Stop = Annotated[list[str] | None, typer.Option(help="Text that ends an answer. Repeatable.")]


def sampling_params(
    temperature: float, top_p: float, top_k: int, seed: int | None
) -> SamplingParams:
    """How tokens are chosen.

    Raises:
        UsageError: a value out of range.
    """
    from paceline.decode.sampler import SamplingParams
    from paceline.serve.api.schema import random_seed

    if not 0 < top_p <= 1:
        raise UsageError(f"--top-p {top_p}: must be above 0 and at most 1")
    return SamplingParams(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=random_seed() if seed is None else seed,
    )


def load_engine(
    model: str,
    adapter: Path | None,
    plan_file: Path | None,
    settings: list[str] | None,
    dtype: str | None,
    device: str,
) -> Engine:
    """The engine that a command asks, its model loaded."""
    from rich.console import Console
    from rich.markup import escape

    from paceline.models.adapters import resolve_adapted
    from paceline.serve import load

    require_dtype(dtype)
    plan = read_plan(plan_file, settings)
    if dtype:
        plan = plan.with_overrides([f'serve.dtype="{dtype}"'])
    with Console(stderr=True).status(f"loading {escape(model)}"):
        return load.load_engine(resolve_adapted(model, adapter), plan, device=device)
