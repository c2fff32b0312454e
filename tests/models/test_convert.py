"""Converted models: the same weights, another residual; no other library takes them for plain."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import pytest
import torch

from paceline.core.errors import UnknownNameError, UsageError
from paceline.models import convert as convert_module
from paceline.models.convert import convert
from paceline.models.hf import WEIGHTS_FILE
from paceline.models.hub import resolve
from paceline.models.weights import build

pytestmark = pytest.mark.cpu


def weights_of(source):
    return {name: source.weights.read(name) for name, _ in build(source.spec).named_parameters()}


@pytest.mark.parametrize(
    ("layers", "first_layer"), [("upper-half", 1), ("all", 0)], ids=["upper half", "all"]
)
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "qwen3"])
def test_what_is_written_is_read_as_a_ladder_of_the_same_weights(
    tmp_path, family, layers, first_layer
):
    """Three layers: the upper half of them is two."""
    plain = resolve(f"random:{family}:tiny")
    spec = convert(plain, "ladder", layers, tmp_path / "out")
    found = resolve(str(tmp_path / "out"))
    assert found.spec == spec
    assert spec.ladder_from == first_layer
    expected = weights_of(plain)
    assert all(torch.equal(expected[name], value) for name, value in weights_of(found).items())
    assert found.tokenizer.encode("to and fro") == plain.tokenizer.encode("to and fro")
    assert found.tokenizer.eos_ids == plain.tokenizer.eos_ids


def test_the_weights_file_is_that_of_the_plain_folder_bit_for_bit(tmp_path):
    """And converting anew from the converted weights' folder is refused, as it is a ladder."""
    convert(resolve("random:llama:tiny"), "ladder", "all", tmp_path / "one")
    convert(resolve("random:llama:tiny"), "ladder", "upper-half", tmp_path / "two")
    one, two = (tmp_path / name / WEIGHTS_FILE for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    with pytest.raises(UsageError, match="a ladder from layer 0 on already"):
        convert(resolve(str(tmp_path / "one")), "ladder", "all", tmp_path / "three")


def test_transformers_does_not_take_it_for_the_plain_model(tmp_path):
    """Neither by its type nor, where a class is named, by the sizes that it finds."""
    transformers = pytest.importorskip("transformers")
    convert(resolve("random:llama:tiny"), "ladder", "all", tmp_path / "out")
    with pytest.raises(ValueError, match="paceline_ladder"):
        transformers.AutoConfig.from_pretrained(tmp_path / "out")
    with pytest.raises(ValueError, match="paceline_ladder"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    config = transformers.LlamaConfig.from_pretrained(tmp_path / "out")
    assert config.hidden_size != resolve("random:llama:tiny").spec.d_model


def test_what_cannot_be_converted_says_why(tmp_path):
    llama = resolve("random:llama:tiny")
    with pytest.raises(UnknownNameError, match="unknown architecture to convert to 'lader'") as bad:
        convert(llama, "lader", "all", tmp_path / "out")
    assert "ladder" in (bad.value.hint or "")
    with pytest.raises(UnknownNameError, match="unknown choice of layers 'upper'"):
        convert(llama, "ladder", "upper", tmp_path / "out")
    for family in ("olmo2", "gemma3"):
        with pytest.raises(UsageError, match="norms behind sublayers"):
            convert(resolve(f"random:{family}:tiny"), "ladder", "all", tmp_path / "out")
    (tmp_path / "there").mkdir()
    with pytest.raises(UsageError, match="there exists already"):
        convert(llama, "ladder", "all", tmp_path / "there")
    assert os.listdir(tmp_path) == ["there"]


def test_a_conversion_that_breaks_off_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_arguments):
        raise OSError("no space left")

    monkeypatch.setattr(convert_module, "write_weights", fail)
    with pytest.raises(OSError, match="no space left"):
        convert(resolve("random:llama:tiny"), "ladder", "all", tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_the_config_holds_the_plain_one_whole(tmp_path):
    source = resolve("random:llama:tiny")
    convert(source, "ladder", "all", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    plain = {**config["plain"], "model_type": config["plain_type"]}
    assert plain == json.loads(source.files["config.json"])
    assert replace(source.spec, ladder_from=0) == resolve(str(tmp_path / "out")).spec
