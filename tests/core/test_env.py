from __future__ import annotations

from pathlib import Path

import pytest

from paceline.core.env import RankEnvironment, cache_folder, rank_environment


def test_cache_folder_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "paceline"


@pytest.mark.parametrize("is_set", [False, True])
def test_cache_folder_without_xdg_is_under_home(monkeypatch, tmp_path, is_set):
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if is_set:
        monkeypatch.setenv("XDG_CACHE_HOME", "")  # empty counts as unset
    assert cache_folder() == tmp_path / ".cache" / "paceline"


def test_a_launched_rank_knows_its_place(monkeypatch):
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert rank_environment() == RankEnvironment(rank=5, world_size=8, local_rank=1)
    monkeypatch.delenv("LOCAL_RANK")
    assert rank_environment() == RankEnvironment(rank=5, world_size=8, local_rank=0)


@pytest.mark.parametrize("absent", ["RANK", "WORLD_SIZE"])
def test_without_a_launcher_there_is_no_rank(monkeypatch, absent):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.delenv(absent)
    assert rank_environment() is None
