"""MODEL arguments: what is found, and what is said where nothing is."""

from __future__ import annotations

import pytest
import torch

from paceline.core.errors import UnknownNameError, UsageError
from paceline.models.families.llama import PRESETS
from paceline.models.hub import fetch, locate, read_model_spec, resolve
from paceline.models.weights import build

pytestmark = pytest.mark.cpu


@pytest.mark.parametrize("size", PRESETS)
def test_random_models(size):
    name = f"random:llama:{size}"
    spec = read_model_spec(name)
    assert spec == PRESETS[size]
    assert spec.num_parameters == sum(p.numel() for p in build(spec).parameters())


def test_a_random_model_is_a_function_of_its_seed():
    one, same, other = (resolve("random:llama:tiny", seed=seed) for seed in (1, 1, 2))
    name = "blocks.2.ffn.down.weight"
    assert torch.equal(one.weights.read(name), same.weights.read(name))
    assert not torch.equal(one.weights.read(name), other.weights.read(name))
    assert one.files == other.files


@pytest.mark.parametrize(
    ("name", "error", "message", "hint"),
    [
        ("random:llama:tinny", UnknownNameError, "size of llama 'tinny'", "did you mean tiny?"),
        ("random:lama:tiny", UnknownNameError, "model family 'lama'", "did you mean llama?"),
        ("random:llama", UsageError, "'random:llama'", "write random:FAMILY:SIZE"),
        ("random:llama:tiny:2", UsageError, "'random:llama:tiny:2'", "write random:FAMILY:SIZE"),
        ("smollm-135m", UnknownNameError, "model 'smollm-135m'", "did you mean smollm2-135m?"),
        ("/no/such/folder", UnknownNameError, "model '/no/such/folder'", "a folder"),
    ],
)
def test_what_is_not_found(name, error, message, hint):
    for look in (resolve, read_model_spec):
        with pytest.raises(error) as caught:
            look(name)
        assert message in caught.value.message
        assert hint in caught.value.hint


def test_only_known_names_are_fetched():
    with pytest.raises(UnknownNameError, match="unknown model 'smollm2'") as caught:
        fetch("smollm2")
    assert caught.value.hint == "did you mean smollm2-135m?"


def test_an_empty_folder_is_no_model(tmp_path):
    assert locate(str(tmp_path)) == tmp_path
    with pytest.raises(UsageError, match=r"cannot read .*config\.json: No such file") as caught:
        resolve(str(tmp_path))
    assert "a model folder holds config.json" in caught.value.hint
