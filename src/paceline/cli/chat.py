"""``paceline chat``: a conversation in the terminal."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from paceline.cli.options import Device, Dtype, PlanFile, Settings
from paceline.cli.sampling import (
    Adapter,
    FrequencyPenalty,
    MaxTokens,
    MinP,
    PresencePenalty,
    RepetitionPenalty,
    Seed,
    Stop,
    Temperature,
    TopK,
    TopP,
    load_engine,
    options,
)
from paceline.core.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

    from paceline.serve.engine import Engine
    from paceline.serve.request import Delta, Request

HELP = """/reset forgets the conversation, /system TEXT starts anew with an instruction,
/help shows this, /exit or Ctrl-D leaves; Ctrl-C ends an answer."""


def chat(
    model: Annotated[str, typer.Argument(help="Whom to talk to.")],
    max_tokens: MaxTokens = 1024,
    temperature: Temperature = 0.7,
    top_p: TopP = 0.95,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    presence_penalty: PresencePenalty = 0.0,
    frequency_penalty: FrequencyPenalty = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    seed: Seed = None,
    stop: Stop = None,
    adapter: Adapter = None,
    plan_file: PlanFile = None,
    settings: Settings = None,
    dtype: Dtype = None,
    device: Device = "auto",
) -> None:
    """Talk to a model; /help inside lists what else it understands."""
    asked = options(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=stop,
    )
    engine = load_engine(model, adapter, plan_file, settings, dtype, device)

    def request_for(prompt_ids: list[int]) -> Request:
        room = max(1, engine.spec.max_positions - len(prompt_ids))
        return replace(asked, max_tokens=min(max_tokens, room)).request(prompt_ids)

    _converse(engine, model, request_for)


def _converse(engine: Engine, model: str, request_for: Callable[[list[int]], Request]) -> None:
    """Reads lines until the person leaves."""
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False)
    console.print(f"[bold]{escape(model)}[/bold]  [dim]/help for help, Ctrl-D to leave[/dim]")
    messages: list[dict[str, str]] = []
    while True:
        try:
            line = console.input("[bold cyan]you[/bold cyan]  ").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        command, _, rest = line.partition(" ")
        match command:
            case "":
                continue
            case "/exit":
                return
            case "/help":
                console.print(HELP, style="dim")
            case "/reset":
                messages.clear()
            case "/system":
                messages[:] = [{"role": "system", "content": rest}]
            case _ if command.startswith("/"):
                console.print(f"no command {command}; /help lists them", style="red", markup=False)
            case _:
                _turn(engine, request_for, messages, line, console)


def _turn(
    engine: Engine,
    request_for: Callable[[list[int]], Request],
    messages: list[dict[str, str]],
    line: str,
    console: Console,
) -> None:
    """One question and its answer; a question that is refused leaves the conversation as it was."""
    from paceline.models.chat import render_chat

    asked = [*messages, {"role": "user", "content": line}]
    try:
        prompt = render_chat(engine.tokenizer, asked)
        request = request_for(engine.tokenizer.encode(prompt, add_special_tokens=False))
        answer = _stream(engine, request, console)
    except RequestError as error:
        console.print(str(error), style="red", markup=False)
        return
    messages[:] = [*asked, {"role": "assistant", "content": answer}]


def _stream(engine: Engine, request: Request, console: Console) -> str:
    """Shows the answer as it comes, with its speed; Ctrl-C ends it where it is."""
    parts: list[str] = []
    num_tokens = 0

    def show(delta: Delta) -> None:
        nonlocal num_tokens
        num_tokens += len(delta.token_ids)
        parts.append(delta.text)
        console.print(delta.text, end="", markup=False, soft_wrap=True)

    start_s = time.perf_counter()
    request_id = engine.submit(request, show)
    try:
        engine.drain()
    except KeyboardInterrupt:
        engine.cancel(request_id)
        engine.drain()
    rate = num_tokens / (time.perf_counter() - start_s)
    console.print(f"\n[dim]{num_tokens} tokens, {rate:.1f} tokens/s[/dim]")
    return "".join(parts)
