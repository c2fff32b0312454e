"""``paceline generate``: one answer, or a file of them."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from paceline.cli.options import Device, Dtype, Json, PlanFile, Settings, print_json
from paceline.cli.sampling import (
    Adapter,
    FrequencyPenalty,
    IgnoreEos,
    JsonObject,
    JsonSchema,
    LogitBias,
    Logprobs,
    MaxTokens,
    MinP,
    MinTokens,
    PresencePenalty,
    Regex,
    RepetitionPenalty,
    Seed,
    Stop,
    StopTokenIds,
    Temperature,
    TopK,
    TopP,
    load_engine,
    options,
)
from paceline.core.errors import PacelineError, UsageError

if TYPE_CHECKING:
    from paceline.serve.engine import Engine
    from paceline.serve.offline import Progress
    from paceline.serve.options import Options

_ASKED = (
    *("max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "presence_penalty"),
    *("frequency_penalty", "repetition_penalty", "logit_bias", "seed", "stop", "stop_token_ids"),
    *("ignore_eos", "logprobs", "json_schema", "regex", "json_object"),
)


def generate(
    model: Annotated[str, typer.Argument(help="What to ask.")],
    prompt: Annotated[str | None, typer.Option(help="Text to continue, as it is.")] = None,
    input_file: Annotated[
        Path | None, typer.Option("--input", help="JSON lines, each with a prompt or messages.")
    ] = None,
    output_file: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where answers to --input go, in order.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with --output.")] = False,
    max_tokens: MaxTokens = 128,
    min_tokens: MinTokens = 0,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    presence_penalty: PresencePenalty = 0.0,
    frequency_penalty: FrequencyPenalty = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    logit_bias: LogitBias = None,
    seed: Seed = None,
    stop: Stop = None,
    stop_token_ids: StopTokenIds = None,
    ignore_eos: IgnoreEos = False,
    logprobs: Logprobs = None,
    json_schema: JsonSchema = None,
    regex: Regex = None,
    json_object: JsonObject = False,
    adapter: Adapter = None,
    plan_file: PlanFile = None,
    settings: Settings = None,
    dtype: Dtype = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Continue a prompt, or those of a file; a text goes to stdout as it comes."""
    given = locals()  # whose names are those of `Options`
    _require_one(prompt, input_file, output_file, resume)
    asked = options(
        default_seed=None if input_file is None else 0, **{name: given[name] for name in _ASKED}
    )
    engine = load_engine(model, adapter, plan_file, settings, dtype, device)
    if prompt is not None:
        _answer(engine, prompt, asked, as_json)
    elif input_file is not None and output_file is not None:
        _answer_file(engine, input_file, output_file, asked, resume, as_json)


def _require_one(prompt: str | None, file: Path | None, output: Path | None, resume: bool) -> None:
    """Raises UsageError for flags that do not go together."""
    if (prompt is None) == (file is None):
        raise UsageError("either --prompt or --input says what to answer")
    if (file is None) != (output is None):
        raise UsageError("--input and --output go together")
    if resume and file is None:
        raise UsageError("--resume goes with --input")


def _answer(engine: Engine, prompt: str, asked: Options, as_json: bool) -> None:
    """One answer."""
    from paceline.serve.engine import join
    from paceline.serve.offline import answer_as_json
    from paceline.serve.request import Delta

    request = asked.request(engine.tokenizer.encode(prompt))
    deltas: list[Delta] = []
    engine.submit(request, deltas.append)
    while not deltas or deltas[-1].finish_reason is None:
        num_shown = len(deltas)
        engine.step()
        if not as_json:
            typer.echo("".join(delta.text for delta in deltas[num_shown:]), nl=False)
    answer = join(deltas)
    if as_json:
        print_json(answer_as_json(answer, len(request.prompt_ids)))
    else:
        typer.echo()
    if answer.error:
        raise PacelineError(answer.error)


def _answer_file(
    engine: Engine, source: Path, target: Path, asked: Options, resume: bool, as_json: bool
) -> None:
    """A file of answers, with a bar that says how far it has come."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    from paceline.serve.offline import answer_file

    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("lines  {task.fields[num_tokens]} tokens"),
        TimeRemainingColumn(),
    )
    bar = Bar(*columns, console=Console(stderr=True))
    task = bar.add_task("", total=None, num_tokens=0)

    with ExitStack() as stack:

        def show(progress: Progress) -> None:
            if not bar.live.is_started:  # not before there is something to show
                stack.enter_context(bar)
            bar.update(
                task,
                total=progress.num_lines,
                completed=progress.num_done,
                num_tokens=progress.num_tokens,
            )

        end = answer_file(engine, source, target, asked, resumes=resume, on_progress=show)
    if as_json:
        counted = {"lines": end.num_lines, "tokens": end.num_tokens, "refused": end.num_refused}
        print_json({"output": str(target), **counted})
    if end.num_refused:
        raise PacelineError(
            f"{end.num_refused} lines could not be answered", hint=f'their "error" in {target}'
        )
