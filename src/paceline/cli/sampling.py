"""Flags of the verbs that generate, and the engine that they ask."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from paceline.cli.options import read_plan, require_dtype
from paceline.core.errors import UsageError

if TYPE_CHECKING:
    from paceline.serve.engine import Engine
    from paceline.serve.options import Options

MaxTokens = Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)]
MinTokens = Annotated[int, typer.Option(help="Shortest answer, in tokens.", min=0)]
Temperature = Annotated[float, typer.Option(help="0 takes the most likely token.", min=0.0)]
TopP = Annotated[float, typer.Option(help="Keep the most likely tokens up to this probability.")]
TopK = Annotated[int, typer.Option(help="Keep this many of the most likely tokens; 0: all.", min=0)]
MinP = Annotated[
    float, typer.Option(help="Drop tokens less likely than this share of the likeliest; 0: none.")
]
PresencePenalty = Annotated[
    float, typer.Option(help="Taken off the logit of each token that the answer holds.")
]
FrequencyPenalty = Annotated[
    float, typer.Option(help="Taken off it as many times as the answer holds the token.")
]
RepetitionPenalty = Annotated[
    float, typer.Option(help="Divides logits of tokens of prompt and answer; 1: none.")
]
LogitBias = Annotated[
    list[str] | None,
    typer.Option(help="Added to a token's logit: TOKEN_ID=BIAS. Repeatable.", metavar="ID=BIAS"),
]
Seed = Annotated[
    int | None, typer.Option(help="Of the sampling; random unless given, 0 for a file.")
]
Adapter = Annotated[
    Path | None, typer.Option(help="Folder of an adapter for MODEL, as `peft` or we save it.")
]
Stop = Annotated[list[str] | None, typer.Option(help="Text that ends an answer. Repeatable.")]
StopTokenIds = Annotated[
    list[int] | None,
    typer.Option("--stop-token-id", help="Token that ends an answer. Repeatable."),
]
IgnoreEos = Annotated[bool, typer.Option("--ignore-eos", help="Go on past the end of text.")]
Logprobs = Annotated[
    int | None, typer.Option(help="Tell log-probabilities, and of this many likeliest tokens.")
]
JsonSchema = Annotated[
    str | None, typer.Option(help="JSON schema that answers satisfy; @FILE reads it.")
]
Regex = Annotated[str | None, typer.Option(help="Regular expression that matches whole answers.")]
JsonObject = Annotated[bool, typer.Option("--json-object", help="Answers are JSON objects.")]


def options(*, default_seed: int | None = None, **flags: Any) -> Options:
    """What the flags ask for.

    Args:
        default_seed: where none is given; None for a random one.
        flags: by the names of `Options`; for a grammar `json_schema`, `regex` and `json_object`.

    Raises:
        UsageError: a value out of range.
    """
    from paceline.serve.api.schema import random_seed
    from paceline.serve.options import Options, grammar_of, require_in_range

    seed = flags.pop("seed")
    if seed is None:
        seed = random_seed() if default_seed is None else default_seed
    schema = flags.pop("json_schema", None)
    grammar = grammar_of(
        _schema_text(schema), flags.pop("regex", None), flags.pop("json_object", False)
    )
    biases = _biases(flags.pop("logit_bias", None) or [])
    texts = {name: tuple(flags.pop(name, None) or ()) for name in ("stop", "stop_token_ids")}
    asked = Options(seed=seed, grammar=grammar, logit_bias=biases, **texts, **flags)
    require_in_range(asked, flags=True)
    return asked


def _biases(pairs: list[str]) -> tuple[tuple[int, float], ...]:
    from paceline.serve.options import read_logit_bias

    halves = [pair.partition("=") for pair in pairs]
    try:
        return read_logit_bias({token: bias for token, _, bias in halves})
    except UsageError as error:
        raise UsageError(f"--logit-bias {' '.join(pairs)}: must be TOKEN_ID=BIAS") from error


def _schema_text(schema: str | None) -> str | None:
    if schema is None or not schema.startswith("@"):
        return schema
    try:
        return Path(schema[1:]).read_text()
    except (OSError, ValueError) as error:
        raise UsageError(f"--json-schema {schema}: {error}") from error


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
