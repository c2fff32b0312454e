"""What all tests share: a cache of their own, and imports paid once, before ranks are forked."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Imports torch once where a collected test needs it, so that forked ranks have it."""
    if any(mark.name in ("cpu", "ranks", "slow") for item in items for mark in item.iter_markers()):
        import torch
        import torch.distributed.checkpoint
        import torch.distributed.fsdp
        import torch.distributed.tensor

        torch.testing.assert_close(torch.ones(1), torch.ones(1))  # imports what it needs


@pytest.fixture(autouse=True)
def _own_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Keeps the user's cache out of tests, but for those that need the fetched model."""
    if request.node.get_closest_marker("slow") is None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    os.environ.pop("RANK", None)
