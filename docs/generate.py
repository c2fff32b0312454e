"""Writes the parts of the documents that the code knows best; ``--check`` fails if they are stale.

docs/techniques.md: the docstring of every technique in a name table.
docs/contract.md: between its markers, the commands with their flags and the plan's keys.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import typer.core
import typer.main

from paceline.cli.main import app
from paceline.core.config import Config, plain
from paceline.memory.remat import REMAT
from paceline.models.families import FAMILIES
from paceline.models.peft import PEFT
from paceline.optim import OPTIMIZERS
from paceline.parallel.context import METHODS
from paceline.parallel.data import STAGES
from paceline.parallel.expert import DISPATCHES
from paceline.parallel.pipeline import SCHEDULES
from paceline.plan.plan import Plan
from paceline.serve.schedule import POLICIES

DOCS = Path(__file__).parent
TABLES = {
    "zero.stage": STAGES,
    "pipeline.schedule": SCHEDULES,
    "context.method": METHODS,
    "expert.dispatch": DISPATCHES,
    "memory.remat": REMAT,
    "peft.method": PEFT,
    "optimizer.name": OPTIMIZERS,
    "serve.policy": POLICIES,
    "model_type, in a model's config.json": FAMILIES,
}
MODULES = {
    "mesh.tp": "paceline.parallel.tensor.decoder",
    "pipeline.vocabulary": "paceline.parallel.pipeline.spread_vocabulary",
    "expert.balance_loss_weight": "paceline.models.balance",
    "serve.adapters": "paceline.models.peft.beside",
    "ladder_from, in a model's sizes": "paceline.models.ladder",
}
"""Plan key to the technique that it alone chooses."""


def main() -> None:
    written = {
        DOCS / "techniques.md": techniques(),
        DOCS / "contract.md": with_generated(
            (DOCS / "contract.md").read_text(), {"commands": commands(), "plan": plan_keys()}
        ),
    }
    stale = [path for path, text in written.items() if _read(path) != text]
    if "--check" in sys.argv:
        sys.exit(f"stale, run `make docs`: {', '.join(map(str, stale))}" if stale else 0)
    for path in stale:
        path.write_text(written[path])


def techniques() -> str:
    """Every technique by the plan key that chooses it."""
    parts = ["# Techniques\n\nWritten by `make docs` from the docstrings. Do not edit.\n"]
    for key, table in TABLES.items():
        parts.append(f"\n## {key}\n")
        parts += [f"\n### {name}\n\n{_docstring(table[name])}\n" for name in table]
    for key, module in MODULES.items():
        parts.append(f"\n## {key}\n\n{_docstring(module)}\n")
    return "".join(parts)


def commands() -> str:
    """Every command with its arguments and flags."""
    lines = [" ".join(["paceline", *path, *flags]) for path, flags in _walk(_root(), [])]
    return "```\n" + "\n".join(lines) + "\n```"


def plan_keys() -> str:
    """Every plan key with its default, as a plan file."""
    lines: list[str] = []
    for field in dataclasses.fields(Plan):
        lines += _table(field.name, get_type_hints(Plan)[field.name])
    return "```toml\n" + "\n".join(lines).strip() + "\n```"


def with_generated(text: str, blocks: dict[str, str]) -> str:
    """A document with what stands between its markers replaced."""
    for name, block in blocks.items():
        begin, end = f"<!-- {name}: generated -->\n", f"\n<!-- {name}: end -->"
        before, rest = text.split(begin)
        text = before + begin + block + end + rest.split(end)[1]
    return text


def _root() -> typer.core.TyperGroup:
    root = typer.main.get_command(app)
    assert isinstance(root, typer.core.TyperGroup)
    return root


def _walk(group: typer.core.TyperGroup, path: list[str]) -> Iterator[tuple[list[str], list[str]]]:
    for name, command in group.commands.items():
        if isinstance(command, typer.core.TyperGroup):
            yield from _walk(command, [*path, name])
        else:
            yield [*path, name], [_flag(parameter) for parameter in command.params]


def _flag(parameter: Any) -> str:
    if not isinstance(parameter, typer.core.TyperOption):
        text = (parameter.metavar or parameter.name).upper()
    else:
        text = "|".join(sorted((*parameter.opts, *parameter.secondary_opts), key=len))
        text += "..." if parameter.multiple else ""
    return text if parameter.required else f"[{text}]"


def _table(path: str, config: type[Config]) -> list[str]:
    hints = get_type_hints(config)
    lines, inner = ["", f"[{path}]"], []
    for field in dataclasses.fields(config):
        hint = hints[field.name]
        if inspect.isclass(hint) and issubclass(hint, Config):
            inner += _table(f"{path}.{field.name}", hint)
        elif field.default is None:
            lines.append(f"# {field.name}: absent by default")
        else:
            has_maker = field.default_factory is not dataclasses.MISSING
            default = field.default_factory() if has_maker else field.default
            lines.append(f"{field.name} = {json.dumps(plain(default))}")
    return lines + inner


def _docstring(location: str) -> str:
    module = importlib.import_module(location.split(":")[0])
    return inspect.getdoc(module) or ""


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


if __name__ == "__main__":
    main()
