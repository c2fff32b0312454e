"""What is installed, read from metadata that a test lays out."""

from __future__ import annotations

import sys

import pytest

from paceline.core import installed

METADATA = """Metadata-Version: 2.1
Name: paceline
Version: 9.0
Requires-Python: >=3.99
Requires-Dist: numpy<2000,>=1
Requires-Dist: not-there>=1.5
Requires-Dist: nothing-here; sys_platform == "amiga"
Provides-Extra: one
Requires-Dist: rich<1; extra == "one"
Provides-Extra: two
Requires-Dist: paceline[one]; extra == "two"
Requires-Dist: not-there-either; extra == "two"
"""


@pytest.fixture(autouse=True)
def _another_paceline(tmp_path, monkeypatch):
    folder = tmp_path / "paceline-9.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(METADATA)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])


def test_dependencies_and_what_is_wrong_with_them():
    numpy, missing = installed.dependencies()
    assert (numpy.name, numpy.supported, numpy.problem) == ("numpy", ">=1,<2000", "")
    assert numpy.installed == installed.installed_version("numpy")
    assert (missing.installed, missing.problem) == (None, "not-there is not installed")


def test_extras_add_their_own():
    one, two = installed.extras().values()
    assert [package.name for package in one] == ["rich"]
    version = installed.installed_version("rich")
    assert one[0].problem == f"rich {version} is outside <1"
    assert [package.problem for package in two] == ["not-there-either is not installed"]


def test_the_interpreter():
    python = installed.python()
    assert python.installed == sys.version.split()[0]
    assert python.problem == f"python {python.installed} is outside >=3.99"
