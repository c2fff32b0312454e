from __future__ import annotations

import pytest

from paceline.core import errors
from paceline.core.errors import ConfigError, Problem, RequestError, UnknownNameError, name_hint

PROBLEM = Problem("mesh.tp", "6", "must divide 8", "use 4")

ERRORS = [
    (errors.PacelineError("why"), 1),
    (errors.UsageError("why"), 2),
    (ConfigError([PROBLEM]), 2),
    (UnknownNameError("policy", "x", ["y"]), 2),
    (errors.MissingExtraError("ray", "ray"), 2),
    (errors.DataError("why"), 1),
    (errors.RankError("why"), 1),
    (RequestError("why"), 2),
]


@pytest.mark.parametrize(("error", "exit_code"), ERRORS, ids=lambda e: type(e).__name__)
def test_every_error_has_its_exit_code(error, exit_code):
    assert isinstance(error, errors.PacelineError)
    is_usage = exit_code == 2 and not isinstance(error, RequestError)
    assert isinstance(error, errors.UsageError) == is_usage
    assert error.exit_code == exit_code


def test_messages_end_with_the_way_out():
    assert str(errors.DataError("no such step")) == "no such step"
    unknown = UnknownNameError("policy", "seriel", ["serial", "chunked"])
    assert str(unknown) == "unknown policy 'seriel'\nhint: did you mean serial?"
    missing = errors.MissingExtraError("ray", "cluster")
    assert str(missing) == "ray is not installed\nhint: pip install 'paceline[cluster]'"
    request = RequestError("no such model", status=404, hint="GET /v1/models")
    assert str(request) == "no such model\nhint: GET /v1/models"
    assert (request.status, RequestError("why").status) == (404, 400)


def test_a_problem_is_text_and_data():
    assert str(PROBLEM) == "mesh.tp = 6: must divide 8\n  hint: use 4"
    assert str(Problem("a", "1", "is odd")) == "a = 1: is odd"
    keys = ("path", "value", "rule", "hint")
    assert PROBLEM.to_dict() == dict(
        zip(keys, ("mesh.tp", "6", "must divide 8", "use 4"), strict=True)
    )


def test_a_config_error_tells_all_problems_and_the_source():
    other = Problem("mesh.pp", "0", "must be positive")
    error = ConfigError([PROBLEM, other], source="plan.toml")
    assert error.problems == (PROBLEM, other)
    assert str(error) == f"2 problems in plan.toml:\n{PROBLEM}\n{other}"
    assert str(ConfigError([other])) == f"1 problem:\n{other}"


def test_near_names_come_first_and_all_names_where_none_is_near():
    known = ["zigzag-ring", "ring", "ulysses"]
    assert name_hint("ulises", known) == "did you mean ulysses?"
    assert name_hint("rings", known) == "did you mean ring?"
    assert name_hint("zero-bubble", ["v-half", "zero-bubble-w", "zero-bubbles"]) == (
        "did you mean zero-bubbles or zero-bubble-w?"
    )
    assert name_hint("?", known) == "one of ring, ulysses, zigzag-ring"
