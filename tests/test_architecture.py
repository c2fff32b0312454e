"""What import-linter cannot see: imports below a package's root, and private names of torch."""

from __future__ import annotations

import ast
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "paceline"
PRIVATE_TORCH_ALLOWED = {"dist/compat.py", "dist/testing.py", "kernels/compat.py"}


def imports_of(path: Path) -> list[str]:
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def torch_attributes_of(path: Path) -> list[str]:
    """Dotted names below torch that are read."""
    nodes = ast.walk(ast.parse(path.read_text()))
    names = [ast.unparse(node) for node in nodes if isinstance(node, ast.Attribute)]
    return [name for name in names if name.startswith("torch.")]


def files(*folders: str) -> list[Path]:
    found = [path for folder in folders for path in (SOURCE / folder).rglob("*.py")]
    assert found
    return found


def test_models_know_of_no_ranks():
    for path in files("models"):
        named = imports_of(path) + torch_attributes_of(path)
        assert [name for name in named if name.startswith("torch.distributed")] == [], path


def test_decisions_have_no_torch_clock_or_dice():
    words = {"words.py", "spread_embedding.py", "spread_head.py", "spread_vocabulary.py"}
    runners = {"passes.py", "runtime.py", "stages.py"} | words
    pipeline = [path for path in files("parallel/pipeline") if path.name not in runners]
    placement = [path for path in files("parallel/context") if path.name == "placement.py"]
    for path in [*files("serve/schedule"), *pipeline, *placement]:
        roots = {name.split(".")[0] for name in imports_of(path)}
        assert roots.isdisjoint({"torch", "time", "random", "numpy", "datetime"}), path


def test_private_names_of_torch_have_one_home():
    for path in files("."):
        if str(path.relative_to(SOURCE)) in PRIVATE_TORCH_ALLOWED:
            continue
        named = [n for n in imports_of(path) if n.split(".")[0] == "torch"]
        private = [
            name
            for name in named + torch_attributes_of(path)
            if any(part.startswith("_") and not part.startswith("__") for part in name.split("."))
        ]
        assert private == [], path


def test_environment_variables_have_one_reader():
    for path in files("."):
        if path.name not in ("env.py", "launch.py"):  # the launcher passes its own on
            assert "os.environ" not in path.read_text(), path


def test_no_file_is_named_for_nothing():
    names = {path.stem for path in files(".")}
    assert names.isdisjoint({"utils", "util", "helpers", "common", "misc"})


def test_the_loops_fit_on_a_screen():
    for name, function in (("train/trainer.py", "run"), ("serve/engine.py", "step")):
        tree = ast.parse((SOURCE / name).read_text())
        found = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == function]
        assert found
        assert all((node.end_lineno or 0) - node.lineno < 40 for node in found)


def test_no_function_of_the_engine_is_long():
    for path in files("serve", "decode"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert (node.end_lineno or 0) - node.lineno < 60, f"{path.name}: {node.name}"
