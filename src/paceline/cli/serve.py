"""``paceline serve``: a model behind the API that OpenAI's clients speak."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from paceline.cli.options import Device, Dtype, PlanFile, Settings, read_plan
from paceline.cli.sampling import Adapter, load_engine


def serve(
    model: Annotated[str, typer.Argument(help="What to serve.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes any.", min=0, max=65535)] = 8000,
    served_model_name: Annotated[
        str | None, typer.Option(help="What clients call the model; MODEL unless given.")
    ] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="One key on each line.")] = None,
    adapter: Adapter = None,
    plan_file: PlanFile = None,
    settings: Settings = None,
    dtype: Dtype = None,
    device: Device = "auto",
) -> None:
    """Serve a model over HTTP until Ctrl-C or SIGTERM."""
    from paceline.serve.api.keys import ApiKeys
    from paceline.serve.api.server import EngineThread, listen, run

    keys = ApiKeys.from_file(api_key_file)
    limits = read_plan(plan_file, settings).serve.limits
    with listen(host, port, keys) as listener:
        thread = EngineThread(
            lambda: load_engine(model, adapter, plan_file, settings, dtype, device)
        )
        name = served_model_name or model
        address = f"http://{host}:{listener.getsockname()[1]}"
        print(f"serving {name} at {address}/v1 (Ctrl-C stops)", file=sys.stderr, flush=True)
        run(thread, listener, name, keys, limits)
