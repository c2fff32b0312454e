"""A run's data and trainers, shared by the tests of training."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of random lengths, from 1 to 60 characters, of a few words that repeat."""
    generator = np.random.default_rng(11)
    words = ["pace ", "line ", "ride ", "wind ", "front ", "turn "]
    path = tmp_path_factory.mktemp("data") / "documents.jsonl"
    texts = [
        "".join(generator.choice(words, size=n))[:m] for n, m in generator.integers(1, 60, (400, 2))
    ]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(autouse=True)
def _quick_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small products measure a peak in no time; how high it is matters to no test here."""
    from paceline.kernels import device

    monkeypatch.setitem(device._MATRIX_SIZE, "cpu", 64)
