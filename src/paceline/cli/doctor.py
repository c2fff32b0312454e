"""``paceline doctor``: what this machine has, and what is missing for what."""

from __future__ import annotations

import os
import platform
import shutil
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

import paceline
from paceline.cli.options import Json, print_json
from paceline.core import installed
from paceline.core.env import cache_folder

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import Console

_GIB = 2**30


def doctor(as_json: Json = False) -> None:
    """Say what this machine has and what is missing for which extra; exit with 1 if it cannot run.

    Nothing is changed, and nothing is asked of the network.
    """
    found = examine()
    if as_json:
        print_json(found)
    else:
        _show(found)
    raise typer.Exit(1 if found["problems"] else 0)


def examine() -> dict[str, Any]:
    """Everything that the command says, as plain data."""
    problems: list[str] = []
    versions: dict[str, dict[str, str | None]] = {}
    extras: dict[str, dict[str, Any]] = {}
    try:
        for package in (installed.python(), *installed.dependencies()):
            supported = {"installed": package.installed, "supported": package.supported}
            versions[package.name] = supported
            problems += [package.problem] if package.problem else []
        for name, packages in installed.extras().items():
            extras[name] = {
                "missing": [package.problem for package in packages if package.problem],
                "install": f"pip install 'paceline[{name}]'",
            }
    except metadata.PackageNotFoundError:
        problems.append("paceline is on the path but not installed: pip install paceline")
    seen = _torch_sees(problems)
    if seen["devices"] and not seen["backends"]:
        problems.append("torch has no process-group backend: plans of several ranks cannot run")
    cache = _cache()
    if not cache["writable"]:
        problems.append(f"{cache['path']} cannot be written to: set XDG_CACHE_HOME")
    return {
        "paceline": paceline.__version__,
        "platform": platform.platform(),
        **seen,
        "versions": versions,
        "extras": extras,
        "cache": cache,
        "clients": {name: installed.installed_version(name) for name in ("pip", "huggingface_hub")},
        "problems": problems,
    }


def _torch_sees(problems: list[str]) -> dict[str, Any]:
    """Devices, backends and the compiler of kernels; a torch that cannot be imported is a problem,
    not a crash.
    """
    from dataclasses import asdict

    try:
        from paceline.kernels import machine, native

        return {
            "devices": [asdict(device) for device in machine.devices()],
            "backends": machine.backends(),
            "compiler": native.compiler(),
        }
    except (ImportError, OSError) as error:
        problems.append(f"torch cannot be imported: {error}")
        return {"devices": [], "backends": [], "compiler": None}


def _cache() -> dict[str, Any]:
    """The cache folder, and the room in it; it need not be there yet."""
    path = cache_folder()
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    is_writable = there.is_dir() and os.access(there, os.W_OK)
    return {
        "path": str(path),
        "writable": is_writable,
        "free_bytes": shutil.disk_usage(there).free,
        "models": sorted(p.name for p in Path(path, "models").glob("[!.]*")),
    }


def _show(found: Mapping[str, Any]) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    console.print(f"[bold]paceline {found['paceline']}[/bold] on {found['platform']}\n")
    _table(console, "device", "memory", "bfloat16", "", rows=map(_device_row, found["devices"]))
    _table(
        console,
        "package",
        "installed",
        "supported",
        rows=[
            (name, version["installed"] or "[red]missing[/red]", version["supported"] or "any")
            for name, version in found["versions"].items()
        ],
    )
    _table(console, "extra", "missing", "to install", rows=map(_extra_row, found["extras"].items()))
    cache, clients = found["cache"], found["clients"]
    room = f"{cache['free_bytes'] / _GIB:.0f} GiB free" if cache["writable"] else "not writable"
    _table(
        console,
        "",
        "",
        rows=[
            ("ranks talk through", ", ".join(found["backends"]) or "nothing"),
            (
                "CPU kernels built by",
                found["compiler"] or "nothing: decoding is slower (install cc)",
            ),
            ("cache", f"{cache['path']} ({room})"),
            ("models in it", ", ".join(cache["models"]) or "none"),
            ("fetches with", ", ".join(f"{n} {v or 'missing'}" for n, v in clients.items())),
        ],
    )
    for problem in found["problems"]:
        console.print(f"[red]problem:[/red] {problem}", soft_wrap=True)
    if not found["problems"]:
        console.print("[green]all that paceline needs is here[/green]")


def _device_row(device: Mapping[str, Any]) -> tuple[str, ...]:
    cores = f"{device['cores']} cores " if device["cores"] else ""
    memory = f"{device['memory_bytes'] / _GIB:.1f} GiB"
    features = cores + " ".join(device["features"])
    return device["name"], memory, "native" if device["has_bfloat16"] else "emulated", features


def _extra_row(item: tuple[str, Mapping[str, Any]]) -> tuple[str, ...]:
    name, extra = item
    missing = extra["missing"]
    if not missing:
        return name, "[green]nothing[/green]", ""
    return name, "; ".join(missing), extra["install"].replace("[", r"\[")


def _table(console: Console, *columns: str, rows: Any) -> None:
    from rich.table import Table

    table = Table(
        *columns, box=None, pad_edge=False, show_header=any(columns), padding=(0, 2, 0, 0)
    )
    cells: Sequence[str]
    for cells in rows:
        table.add_row(*cells)
    console.print(table)
    console.print()
