"""``import paceline as pl``: every name is there, none costs anything before it is used."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import paceline as pl
from paceline.core.errors import UsageError

PROMISED = {"load", "load_plan", "Plan", "parallelize", "Trainer", "Engine", "verify", "plan"}


def in_new_process(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout


@pytest.mark.ranks
def test_the_import_is_light():
    code = "import sys, paceline; print('torch' in sys.modules, 'rich' in sys.modules)"
    assert in_new_process(code) == "False False\n"


@pytest.mark.ranks
def test_a_plan_needs_no_torch():
    code = (
        "import sys, paceline as pl;"
        "plan = pl.Plan.from_dict({'mesh': {'dp_shard': 2}, 'zero': {'stage': 3}});"
        "assert plan == pl.Plan(mesh=pl.MeshConfig(dp_shard=2), zero=pl.ZeroConfig(stage=3));"
        "print('torch' in sys.modules)"
    )
    assert in_new_process(code) == "False\n"


@pytest.mark.cpu
def test_every_name_is_there():
    assert PROMISED | {"simulate", "global_mean"} <= set(pl._NAMES)
    for name in pl._NAMES:
        assert callable(getattr(pl, name)), name
    assert set(pl._NAMES) <= set(dir(pl))


def test_type_checkers_know_the_same_names():
    tree = ast.parse(Path(pl.__file__).read_text())
    block = next(n for n in tree.body if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.dump(n))
    imported = {a.asname for n in block.body if isinstance(n, ast.ImportFrom) for a in n.names}
    defined = {n.name for n in block.body if isinstance(n, ast.FunctionDef)}
    assert imported | defined == set(pl._NAMES)


@pytest.mark.cpu
def test_packages_that_are_verbs_stay_verbs():
    import paceline.plan.plan
    import paceline.verify.certify

    assert paceline.plan.plan.Plan is pl.Plan
    assert paceline.verify.certify.Certificate is pl.Certificate
    with pytest.raises(UsageError, match="plan is not built in this version"):
        pl.plan("smollm2-135m", cluster="cluster.toml")
    assert pl.verify("random:llama:tiny").certified


def test_what_is_not_built_says_so():
    with pytest.raises(UsageError, match="simulate is not built in this version"):
        pl.simulate("train")


def test_another_name():
    with pytest.raises(AttributeError, match="no attribute 'trainer'"):
        _ = pl.trainer  # type: ignore[attr-defined]


@pytest.mark.cpu
def test_a_plan_from_a_file(tmp_path):
    path = tmp_path / "plan.toml"
    path.write_text("[mesh]\ndp_shard = 2\n")
    assert pl.load_plan(path).zero_stage == 3
    with pytest.raises(UsageError, match="cannot read"):
        pl.load_plan(tmp_path / "none.toml")
