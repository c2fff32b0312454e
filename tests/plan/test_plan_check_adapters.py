from __future__ import annotations

import tomllib

import pytest

from paceline.core.config import TextTable
from paceline.core.errors import ConfigError
from paceline.plan.check import check
from paceline.plan.plan import Plan, ServeConfig

FOLDERS = {"ada": "/adapters/ada", "bob 2": "b"}


def test_adapters_are_a_table_of_names():
    plan = Plan(serve=ServeConfig(adapters=FOLDERS))
    assert plan.serve.adapters == TextTable(FOLDERS) == FOLDERS
    assert Plan.from_dict(tomllib.loads(plan.to_toml())) == plan
    assert check(plan) == []
    assert plan.to_dict()["serve"]["adapters"] == FOLDERS
    assert Plan().serve.adapters == {}


def test_settings_name_them_one_by_one():
    plan = Plan(serve=ServeConfig(adapters=FOLDERS))
    assert plan.with_overrides(["serve.adapters.cyd=./c"]).serve.adapters == FOLDERS | {
        "cyd": "./c"
    }
    with pytest.raises(ConfigError, match=r"serve\.adapters = .*a table whose values are texts"):
        Plan().with_overrides(["serve.adapters.cyd=3"])


@pytest.mark.parametrize("name", ["", " ada", "a\nb"])
def test_a_name_that_no_request_could_give(name):
    (problem,) = check(Plan(serve=ServeConfig(adapters={name: "folder"})))
    assert problem.path == f"serve.adapters.{name}"
    assert "its name must" in problem.rule


def test_an_adapter_without_a_folder():
    (problem,) = check(Plan(serve=ServeConfig(adapters={"ada": ""})))
    assert (problem.path, problem.value) == ("serve.adapters.ada", '""')


def test_layers_stay_whole():
    plan = Plan(serve=ServeConfig(adapters=FOLDERS)).with_overrides(["serve.mesh.tp=2"])
    found = [problem for problem in check(plan) if problem.path == "serve.adapters"]
    if not any(problem.path == "serve.mesh.tp" for problem in check(plan)):
        assert [problem.hint for problem in found] == [
            "set serve.mesh.tp = 1, or merge one adapter: --adapter FOLDER"
        ]
    plan = Plan(serve=ServeConfig(adapters=FOLDERS, batch_invariant=True))
    (problem,) = check(plan)
    assert problem.hint.startswith("set serve.batch_invariant = false")
