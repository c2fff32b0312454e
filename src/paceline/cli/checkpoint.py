"""``paceline checkpoint``: look into checkpoints, check them, export them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from paceline.cli.options import Json, print_json
from paceline.core.errors import UsageError

if TYPE_CHECKING:
    from paceline.train.run import RunFolder

app = typer.Typer(
    help="Look into checkpoints, check them, export them.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Run folder, or one checkpoint.")]


@app.command()
def inspect(path: Folder, as_json: Json = False) -> None:
    """Print what the newest complete checkpoint holds."""
    from paceline.checkpoint.manifest import newest_checkpoint, read_manifest

    checkpoint = newest_checkpoint(path)
    manifest = read_manifest(checkpoint)
    if as_json:
        print_json({"path": str(checkpoint), **asdict(manifest)})
        return
    size_bytes = sum(entry.size_bytes for entry in manifest.files.values())
    typer.echo(f"{checkpoint}: step {manifest.step}, {len(manifest.tensors)} tensors, ", nl=False)
    typer.echo(f"{size_bytes / 2**20:,.1f} MiB in {len(manifest.files)} files")
    for name, entry in manifest.tensors.items():
        typer.echo(f"  {name}  {entry.dtype}  {list(entry.shape)}")


@app.command()
def verify(path: Folder, as_json: Json = False) -> None:
    """Compare every file of the newest complete checkpoint with its checksum."""
    from paceline.checkpoint.manifest import newest_checkpoint, read_manifest, verify_files

    checkpoint = newest_checkpoint(path)
    manifest = read_manifest(checkpoint)
    verify_files(checkpoint, manifest)
    if as_json:
        print_json({"path": str(checkpoint), "step": manifest.step, "whole": True})
    else:
        typer.echo(f"{checkpoint}: all {len(manifest.files)} files are whole")


@app.command()
def export(
    path: Folder,
    out: Annotated[Path, typer.Option("--out", "-o", help="A new folder.")],
    merge: Annotated[
        bool, typer.Option("--merge", help="An adapter: the whole model, with it merged in.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write the newest complete checkpoint's model in Hugging Face layout.

    Of a run with [peft] the adapter alone, as `peft` reads it, unless it is merged.
    """
    from paceline.checkpoint.export import peft_of
    from paceline.checkpoint.manifest import newest_checkpoint, read_manifest
    from paceline.train.run import RunFolder

    checkpoint = newest_checkpoint(path)
    run = RunFolder(checkpoint.resolve().parent.parent)
    method = peft_of(read_manifest(checkpoint)).method
    _export(checkpoint, run, out, is_adapter=method != "none", merge=merge)
    if as_json:
        print_json({"path": str(out), "checkpoint": str(checkpoint)})
    else:
        typer.echo(out)


def _export(checkpoint: Path, run: RunFolder, out: Path, *, is_adapter: bool, merge: bool) -> None:
    """Writes the model itself, an adapter, or the model with it merged in.

    Raises:
        UsageError: nothing to merge, or a base model that is another one now.
    """
    from paceline.checkpoint import export
    from paceline.checkpoint.manifest import read_manifest
    from paceline.models.hub import resolve
    from paceline.plan.model_spec import ModelSpec

    if not is_adapter:
        if merge:
            hint = "leave out --merge: the checkpoint holds the whole model"
            raise UsageError(f"{checkpoint} holds no adapter to merge", hint=hint)
        export.export(checkpoint, run.model_files(), out)
        return
    config, plan = run.read()
    if not merge:
        if config.model.startswith("random:") and plan.train.seed:
            rule = f"{config.model} has other weights than it had in this run: train.seed"
            raise UsageError(f"{rule} = {plan.train.seed}", hint="--merge writes the whole model")
        export.export_adapter(checkpoint, config.model, out)
        return
    base = resolve(config.model, seed=plan.train.seed)
    if base.spec != ModelSpec.from_dict(read_manifest(checkpoint).model):
        raise UsageError(f"{config.model} is not the model that {checkpoint} was trained for")
    export.export_merged(checkpoint, base.weights, run.model_files(), out)
