"""``paceline generate``: one answer."""

from __future__ import annotations

from typing import Annotated

import typer

from paceline.cli.options import Device, Dtype, Json, PlanFile, Settings, print_json
from paceline.cli.sampling import (
    Adapter,
    MaxTokens,
    Seed,
    Stop,
    Temperature,
    TopK,
    TopP,
    load_engine,
    sampling_params,
)


def generate(
    model: Annotated[str, typer.Argument(help="What to ask.")],
    prompt: Annotated[str, typer.Option(help="Text to continue, as it is.")],
    max_tokens: MaxTokens = 128,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = None,
    stop: Stop = None,
    adapter: Adapter = None,
    plan_file: PlanFile = None,
    settings: Settings = None,
    dtype: Dtype = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Continue a prompt; the text goes to stdout as it comes."""
    sampling = sampling_params(temperature, top_p, top_k, seed)
    engine = load_engine(model, adapter, plan_file, settings, dtype, device)

    from paceline.serve.api.shapes import usage
    from paceline.serve.engine import join
    from paceline.serve.request import Delta, Request

    request = Request(
        prompt_ids=tuple(engine.tokenizer.encode(prompt)),
        sampling=sampling,
        max_tokens=max_tokens,
        stop=tuple(stop or ()),
    )
    deltas: list[Delta] = []
    engine.submit(request, deltas.append)
    while not deltas or deltas[-1].finish_reason is None:
        num_shown = len(deltas)
        engine.step()
        if not as_json:
            typer.echo("".join(delta.text for delta in deltas[num_shown:]), nl=False)
    if not as_json:
        typer.echo()
        return
    answer = join(deltas)
    print_json(
        {
            "text": answer.text,
            "token_ids": list(answer.token_ids),
            "finish_reason": answer.finish_reason,
            "usage": usage(len(request.prompt_ids), len(answer.token_ids)),
        }
    )
