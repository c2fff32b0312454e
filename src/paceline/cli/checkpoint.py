"""``paceline checkpoint``: look into checkpoints, check them, export them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from paceline.cli.options import Json, print_json

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
    out: Annotated[Path, typer.Option("--out", "-o", help="A new model folder.")],
    as_json: Json = False,
) -> None:
    """Write the newest complete checkpoint's model in Hugging Face layout."""
    from paceline.checkpoint.export import export as export_model
    from paceline.checkpoint.manifest import newest_checkpoint
    from paceline.train.run import RunFolder

    checkpoint = newest_checkpoint(path)
    export_model(checkpoint, RunFolder(checkpoint.resolve().parent.parent).model_files(), out)
    if as_json:
        print_json({"path": str(out), "checkpoint": str(checkpoint)})
    else:
        typer.echo(out)
