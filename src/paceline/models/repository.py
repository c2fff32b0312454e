"""Repositories of the Hugging Face hub: ``ORG/NAME`` or ``ORG/NAME@REVISION`` as model folders.

They lie in the hub's own cache, which other tools share (``HF_HOME``). Weights come from
safetensors files alone: pickles, which run code when they are read, are never downloaded.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NoReturn

from paceline.core.errors import UsageError

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
_PATTERNS = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model"]
_OTHER_WEIGHTS = (".bin", ".gguf", ".pt", ".pth", ".h5", ".msgpack")


def is_repository(model: str) -> bool:
    """Whether a MODEL reads as a repository's name."""
    return _NAME.fullmatch(model) is not None


def download(model: str, *, only_config: bool = False) -> Path:
    """The folder of a repository's files, downloaded unless they are in the cache.

    Args:
        model: ``ORG/NAME`` or ``ORG/NAME@REVISION``.
        only_config: whether its sizes are all that is wanted.

    Raises:
        UsageError: no such repository or revision, no access, no network, or no safetensors.
    """
    from huggingface_hub import snapshot_download

    repository, _, revision = model.partition("@")
    patterns = ["config.json"] if only_config else _PATTERNS
    try:
        folder = Path(
            snapshot_download(repository, revision=revision or None, allow_patterns=patterns)
        )
    except Exception as error:  # the client passes on what its HTTP library raises
        _explain(model, error)
    if not only_config and not any(folder.glob("*.safetensors")):
        raise _no_safetensors(model)
    return folder


def _explain(model: str, error: Exception) -> NoReturn:
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repository, _, revision = model.partition("@")
    if isinstance(error, GatedRepoError):
        message = f"{repository} is gated: its owners ask for consent"
        hint = f"accept its terms at https://huggingface.co/{repository}, and set HF_TOKEN"
    elif isinstance(error, RepositoryNotFoundError):
        message = f"{repository}: no such folder, and the hub shows no such repository"
        hint = "check its name; for one that is private, set HF_TOKEN"
    elif isinstance(error, RevisionNotFoundError):
        message = f"{repository} has no revision {revision!r}"
        hint = "a branch, a tag or a whole commit hash"
    elif isinstance(error, LocalEntryNotFoundError):
        message = (
            f"{model}: no such folder, it is not whole in the hub's cache, and the hub cannot be "
            "reached"
        )
        hint = "unset HF_HUB_OFFLINE, check the network, or give a folder of its files"
    else:
        message = f"cannot download {model}: {str(error).strip().splitlines()[0]}"
        hint = "check the network, the space in HF_HOME, and HF_TOKEN"
    raise UsageError(message, hint=hint) from error


def _no_safetensors(model: str) -> UsageError:
    """What the repository has instead."""
    others = [name for name in _files(model) if name.endswith(_OTHER_WEIGHTS)]
    quantised = [name for name in others if name.endswith(".gguf")]
    if quantised:
        hint = f"download {quantised[0]} from it, and give that file as the MODEL"
    else:
        hint = "a revision or another repository with safetensors; pickles are never read"
    named = ", ".join(others[:4]) + (", ..." if len(others) > 4 else "")
    instead = f"its weights are {named}" if others else "nor other weights that it can name"
    return UsageError(f"{model} has no *.safetensors: {instead}", hint=hint)


def _files(model: str) -> list[str]:
    """The names of all files of a repository; none where the hub cannot be asked."""
    from huggingface_hub import list_repo_files

    repository, _, revision = model.partition("@")
    try:
        return sorted(list_repo_files(repository, revision=revision or None))
    except Exception:  # as above; the error at hand says enough without it
        return []
