"""Model folders: bits in and out, and what is said of folders that are not whole."""

from __future__ import annotations

import json
import shutil
import struct

import pytest
import torch
from llamas import SMALL, change_config, load, make_llama, save_folder
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaForCausalLM

from paceline.core.errors import DataError, PacelineError, UsageError
from paceline.models.hf import INDEX_FILE, WEIGHTS_FILE, stored_dtype, write_weights
from paceline.models.hub import resolve
from paceline.models.weights import build

pytestmark = pytest.mark.cpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def write_again(folder, target):
    """Reads a folder's weights and writes them anew, with its small files."""
    source = resolve(str(folder))
    config = json.loads(source.files["config.json"])
    names = [name for name, _ in build(source.spec).named_parameters()]
    target.mkdir()
    tensors = ((name, source.weights.read(name)) for name in names)
    write_weights(target / WEIGHTS_FILE, source.spec, tensors, stored_dtype(config))
    for name, text in source.files.items():
        (target / name).write_text(text)
    return target


def edit_weights(folder, **changes):
    """Replaces tensors of a folder; None takes one away."""
    tensors = load_file(folder / WEIGHTS_FILE) | changes
    kept = {name: value for name, value in tensors.items() if value is not None}
    save_file(kept, folder / WEIGHTS_FILE, metadata={"format": "pt"})


@pytest.fixture
def folder(tmp_path):
    return save_folder(make_llama(**SMALL), tmp_path / "llama")


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_import_and_export_keep_every_bit(tmp_path, dtype, is_tied):
    theirs = make_llama(**SMALL, tie_word_embeddings=is_tied, attention_bias=True).to(dtype)
    special = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-40, torch.finfo(dtype).max]
    with torch.no_grad():
        theirs.model.layers[1].mlp.down_proj.weight[0, : len(special)] = torch.tensor(special)
    folder = save_folder(theirs, tmp_path / "llama")
    again = write_again(folder, tmp_path / "again")
    before, after = load_file(folder / WEIGHTS_FILE), load_file(again / WEIGHTS_FILE)
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert after[name].dtype == value.dtype == dtype
        assert torch.equal(bits(after[name]), bits(value)), name


@torch.no_grad()
@pytest.mark.parametrize("is_tied", [True, False])
def test_an_export_loads_in_transformers(tmp_path, is_tied):
    theirs = make_llama(**SMALL, tie_word_embeddings=is_tied, mlp_bias=True)
    again = write_again(save_folder(theirs, tmp_path / "llama"), tmp_path / "again")
    loaded = LlamaForCausalLM.from_pretrained(again)
    tokens_BT = torch.arange(60).view(2, 30)
    expected = theirs(tokens_BT).logits
    assert torch.equal(loaded(tokens_BT).logits, expected)
    assert float((load(again)(tokens_BT) - expected).abs().max()) <= 1e-5
    text = "An export keeps é, 🦙 and <|im_start|>."
    ids = AutoTokenizer.from_pretrained(again)(text)["input_ids"]
    assert resolve(str(again)).tokenizer.encode(text) == ids


def test_our_own_config_loads_in_transformers(tmp_path):
    """A random model, written from our `ModelSpec` alone, is the same model there."""
    source = resolve("random:llama:tiny", seed=3)
    names = [name for name, _ in build(source.spec).named_parameters()]
    tensors = ((name, source.weights.read(name)) for name in names)
    write_weights(tmp_path / WEIGHTS_FILE, source.spec, tensors, torch.float32)
    for name, text in source.files.items():
        (tmp_path / name).write_text(text)
    assert resolve(str(tmp_path)).spec == source.spec
    theirs = LlamaForCausalLM.from_pretrained(tmp_path)
    tokens_BT = torch.arange(60).view(2, 30)
    with torch.no_grad():
        expected = theirs(tokens_BT).logits
        logits = load(source)(tokens_BT)
    assert float(expected.std()) > 0.05
    assert float((logits - expected).abs().max()) <= 1e-6


def test_weights_in_parts(tmp_path):
    theirs = make_llama(**SMALL, tie_word_embeddings=False)
    folder = save_folder(theirs, tmp_path / "llama", max_shard_size="20KB")
    parts = sorted(path.name for path in folder.glob("model-*.safetensors"))
    assert len(parts) >= 3
    assert not (folder / WEIGHTS_FILE).exists()
    ours = load(folder)
    tokens_BT = torch.arange(30)[None]
    with torch.no_grad():
        assert float((ours(tokens_BT) - theirs(tokens_BT).logits).abs().max()) <= 1e-5

    (folder / parts[1]).unlink()
    with pytest.raises(UsageError, match=parts[1]):
        resolve(str(folder))


@pytest.mark.parametrize("index", [[], {}, {"weight_map": 3}, {"weight_map": {"a": [1]}}])
def test_an_index_that_is_none(folder, index):
    (folder / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(DataError) as caught:
        resolve(str(folder))
    assert str(folder / INDEX_FILE) in caught.value.message


def test_truncated_weights(folder):
    path = folder / WEIGHTS_FILE
    whole = path.read_bytes()
    header_bytes = struct.unpack("<Q", whole[:8])[0]
    for length in (0, 5, 8, 8 + header_bytes // 2, 8 + header_bytes, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError) as caught:
            resolve(str(folder))
        assert str(path) in caught.value.message
        assert "truncated" in caught.value.hint
    path.write_bytes(whole)
    assert resolve(str(folder)).spec.num_layers == 2


def test_garbage_for_weights(folder):
    (folder / WEIGHTS_FILE).write_bytes(bytes(range(256)) * 8)
    with pytest.raises(DataError, match=WEIGHTS_FILE):
        resolve(str(folder))


def test_no_weights(folder):
    (folder / WEIGHTS_FILE).unlink()
    with pytest.raises(UsageError) as caught:
        resolve(str(folder))
    assert str(folder / WEIGHTS_FILE) in caught.value.message
    assert "fetch" in caught.value.hint


def test_missing_and_unknown_weights(folder):
    name = "model.layers.1.mlp.up_proj.weight"
    edit_weights(folder, **{name: None, "model.layers.9.extra": torch.ones(1)})
    with pytest.raises(UsageError) as caught:
        resolve(str(folder))
    assert str(folder) in caught.value.message
    assert f"missing {name}" in caught.value.message
    assert "unknown model.layers.9.extra" in caught.value.message


def test_a_long_list_of_missing_weights_is_cut(folder):
    change_config(folder, num_hidden_layers=4)
    with pytest.raises(UsageError, match=r"model\.layers\.2\..* and 15 more; unknown none"):
        resolve(str(folder))


def test_a_wrong_shape(folder):
    edit_weights(folder, **{"model.norm.weight": torch.ones(7)})
    with pytest.raises(UsageError, match=r"model\.norm\.weight has shape \(7,\).*\(24,\)"):
        resolve(str(folder))


def test_a_tied_head_may_be_stored(folder):
    embedding = load_file(folder / WEIGHTS_FILE)["model.embed_tokens.weight"]
    edit_weights(folder, **{"lm_head.weight": embedding.clone()})
    assert "head.weight" not in dict(load(folder).named_parameters())


JSON_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")


@pytest.mark.parametrize("content", [b'{"vocab_', b"", b"\xff\xfe{}", b"[1]", b'"text"'])
@pytest.mark.parametrize("name", JSON_FILES)
def test_json_that_is_none(folder, name, content):
    (folder / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        resolve(str(folder))
    assert str(folder / name) in caught.value.message


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_file_that_is_not_there(folder, name):
    (folder / name).unlink()
    with pytest.raises(UsageError) as caught:
        resolve(str(folder))
    assert name in caught.value.message
    assert str(folder) in caught.value.message
    assert caught.value.hint


def test_a_config_without_a_size(folder):
    change_config(folder, "intermediate_size")
    with pytest.raises(UsageError, match="intermediate_size") as caught:
        resolve(str(folder))
    assert str(folder / "config.json") in caught.value.message


def test_an_unknown_model_type(folder):
    change_config(folder, model_type="lama")
    with pytest.raises(UsageError, match="'lama' is not built") as caught:
        resolve(str(folder))
    assert caught.value.hint == "did you mean llama?"


def test_a_tokenizer_larger_than_the_embedding(tmp_path):
    folder = save_folder(make_llama(**SMALL, vocab_size=258), tmp_path / "llama")
    with pytest.raises(UsageError, match="259 tokens, the embedding 258 rows") as caught:
        resolve(str(folder))
    assert str(folder / "tokenizer.json") in caught.value.message


@pytest.mark.parametrize("name", ["float7", "Tensor", 3])
def test_a_stored_dtype_that_is_none(name):
    with pytest.raises(PacelineError, match=str(name)):
        stored_dtype({"dtype": name})


def test_stored_dtypes():
    assert stored_dtype({}) == torch.float32
    assert stored_dtype({"torch_dtype": "bfloat16"}) == torch.bfloat16
    assert stored_dtype({"dtype": "torch.float16"}) == torch.float16


def test_a_template_in_a_file_of_its_own_is_the_model_s_too(folder):
    """transformers 5 saves it there; so a run must copy it, or its export would not chat."""
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}!")
    source = resolve(str(folder))
    assert source.tokenizer.chat_template == "{{ messages[0]['content'] }}!"
    assert source.files["chat_template.jinja"] == source.tokenizer.chat_template


def test_weights_are_told_from_others_of_their_name(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    assert resolve(str(copy)).identity == resolve(str(folder)).identity
    tensors = load_file(copy / WEIGHTS_FILE)
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1e-3
    save_file(tensors, copy / WEIGHTS_FILE)
    assert resolve(str(copy)).identity != resolve(str(folder)).identity
    assert resolve("random:llama:tiny").identity != resolve("random:llama:tiny", seed=1).identity
