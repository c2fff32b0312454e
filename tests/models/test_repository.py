"""Repositories of the hub: from its cache without a network, and from a hub of this test's own."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlparse

import pytest
import torch
from llamas import SMALL, load, make_llama, save_folder

from paceline.models.hub import locate
from paceline.models.repository import is_repository

pytestmark = [pytest.mark.cpu, pytest.mark.ranks]

SHA = "0123456789abcdef0123456789abcdef01234567"
# Each line of input is a MODEL; each line of output its folder, or its error and hint.
SCRIPT = """
import json, sys
from paceline.core.errors import PacelineError
from paceline.models.hub import fetch, locate, read_model_spec, resolve
for model in json.loads(sys.argv[2]):
    try:
        found = globals()[sys.argv[1]](model)
        print(json.dumps([str(getattr(found, "num_layers", found)), ""]))
    except PacelineError as error:
        print(json.dumps([f"{type(error).__name__}: {error.message}", error.hint]))
"""


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("org/name", True),
        ("HuggingFaceTB/SmolLM2-135M", True),
        ("org/name@main", True),
        ("org/name@refs/pr/1", True),
        ("smollm2-135m", False),
        ("/no/such", False),
        ("./folder/model", False),
        ("a/b/c", False),
        ("../models", False),
        ("org/name@", False),
        ("random:llama:tiny", False),
    ],
)
def test_what_reads_as_a_repository(model, expected):
    assert is_repository(model) == expected


@pytest.fixture
def folder(tmp_path):
    return save_folder(make_llama(**SMALL), tmp_path / "saved")


@pytest.fixture
def environment(tmp_path):
    return os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


def ask(environment, verb, *models, cwd=None):
    """What a new process says of each model: the hub's client reads its environment once."""
    command = [sys.executable, "-c", SCRIPT, verb, json.dumps(models)]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, cwd=cwd
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_repository_in_the_cache_needs_no_network(tmp_path, folder, environment):
    repository = tmp_path / "hf" / "hub" / "models--org--name"
    snapshot = repository / "snapshots" / SHA
    snapshot.parent.mkdir(parents=True)
    folder.rename(snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(SHA)
    offline = environment | {"HF_HUB_OFFLINE": "1"}
    found, at, missing, revision = ask(
        offline, "locate", "org/name", f"org/name@{SHA}", "org/other", "org/name@v2"
    )
    assert found == at == [str(snapshot), ""]
    assert load(snapshot).spec.num_layers == 2
    for (message, hint), name in ((missing, "org/other"), (revision, "org/name@v2")):
        assert message.startswith(f"UsageError: {name}: no such folder")
        assert "the hub cannot be reached" in message
        assert "HF_HUB_OFFLINE" in hint
    # A folder of that name wins.
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert ask(offline, "locate", "org/name", cwd=tmp_path) == [["org/name", ""]]


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as its client asks for."""

    files: dict[str, dict[str, bytes]]
    refused: dict[str, tuple[int, str]]
    asked: list[str]

    def do_HEAD(self):
        self._answer()

    def do_GET(self):
        self._answer()

    def log_message(self, format, *args):  # noqa: A002
        pass

    def _answer(self):
        parts = urlparse(self.path).path.strip("/").split("/")
        is_api = parts[:2] == ["api", "models"]
        parts = parts[2:] if is_api else parts
        repository, (kind, revision, *rest) = "/".join(parts[:2]), parts[2:]
        if repository in self.refused or repository not in self.files:
            return self._refuse(*self.refused.get(repository, (404, "RepoNotFound")))
        if revision not in ("main", SHA):
            return self._refuse(404, "RevisionNotFound")
        files = self.files[repository]
        if is_api and kind == "revision":
            siblings = [{"rfilename": name} for name in files]
            return self._send_json({"id": repository, "sha": SHA, "siblings": siblings})
        if is_api:
            entries = [
                {"type": "file", "path": n, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
                for n, c in files.items()
            ]
            return self._send_json(entries)
        self.asked.append("/".join(rest))
        return self._send(files["/".join(rest)])

    def _refuse(self, status, code):
        self._send(b"", status, {"X-Error-Code": code, "X-Error-Message": code})

    def _send_json(self, value):
        self._send(json.dumps(value).encode(), 200, {"Content-Type": "application/json"})

    def _send(self, content, status=200, headers=None):
        etag = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": SHA}
        self.send_response(status)
        length = {"Content-Length": str(len(content))}
        for name, value in (etag | length | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


@pytest.fixture
def hub(folder, environment):
    """The environment of a client of a hub with a few repositories."""
    model = {path.name: path.read_bytes() for path in folder.iterdir()}
    Hub.files = {
        "org/whole": model | {"pytorch_model.bin": b"code", "README.md": b"", "x.py": b"code"},
        "org/pickled": {"config.json": b"{}", "pytorch_model.bin": b"", "training_args.bin": b""},
        "org/quantised": {"README.md": b"", "model-Q4_K_M.gguf": b"", "model-Q8_0.gguf": b""},
        "org/empty": {"config.json": b"{}"},
    }
    Hub.refused = {"org/gated": (403, "GatedRepo")}
    Hub.asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield environment | {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}"}
    server.shutdown()
    server.server_close()


@torch.no_grad()
def test_a_repository_is_downloaded_without_pickles(hub, folder):
    [(found, _)] = ask(hub, "fetch", "org/whole")
    names = {path.name for path in folder.iterdir()}
    assert set(Hub.asked) == names
    tokens_BT = torch.arange(12).view(2, 6)
    assert torch.equal(load(Path(found))(tokens_BT), load(folder)(tokens_BT))
    assert locate(found) == Path(found)
    Hub.asked.clear()
    assert ask(hub | {"HF_HUB_OFFLINE": "1"}, "fetch", "org/whole") == [[found, ""]]
    assert Hub.asked == []


def test_sizes_need_the_config_alone(hub):
    assert ask(hub, "read_model_spec", "org/whole@main") == [["2", ""]]
    assert set(Hub.asked) == {"config.json"}
    ask(hub, "fetch", "org/whole")  # what was left out then is fetched when it is wanted
    assert "model.safetensors" in Hub.asked


def test_what_cannot_be_used(hub):
    models = {
        "org/none": ("the hub shows no such repository", "HF_TOKEN"),
        "org/gated": ("org/gated is gated", "accept its terms at https://huggingface.co/org/gated"),
        "org/whole@v9": ("org/whole has no revision 'v9'", "a branch, a tag"),
        "org/pickled": ("its weights are pytorch_model.bin", "pickles are never read"),
        "org/quantised": ("model-Q4_K_M.gguf, model-Q8_0.gguf", "download model-Q4_K_M.gguf"),
        "org/empty": ("org/empty has no *.safetensors", "another repository"),
    }
    found = ask(hub, "resolve", *models)
    for (message, hint), (expected, way_out) in zip(found, models.values(), strict=True):
        assert message.startswith("UsageError: ")
        assert expected in message
        assert way_out in hint


def test_a_hub_that_cannot_be_reached(environment):
    lonely = environment | {"HF_ENDPOINT": "http://127.0.0.1:9"}
    [(message, hint)] = ask(lonely, "locate", "org/whole")
    assert "org/whole: no such folder" in message
    assert "the hub cannot be reached" in message
    assert "network" in hint
