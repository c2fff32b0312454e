"""Adapter folders that are broken, or another model's: one error that says which and why."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from adapted import added_tensors, config_of, spec_of
from safetensors.torch import load_file, save_file

from paceline.core.errors import DataError, PacelineError, UsageError
from paceline.models.adapters import resolve_adapted
from paceline.models.hub import resolve
from paceline.models.peft.files import base_model, is_adapter, open_adapter, write_adapter

pytestmark = pytest.mark.cpu

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
MODEL = "random:llama:tiny"


@pytest.fixture
def folder(tmp_path) -> Path:
    """A LoRA for the tiny Llama."""
    return write(tmp_path / "adapter", "lora")


def write(folder: Path, method: str, base: str = MODEL) -> Path:
    folder.mkdir()
    config = config_of(method)
    write_adapter(folder, spec_of(), config, base, added_tensors(spec_of(), config))
    return folder


def change(folder: Path, **changes: object) -> None:
    config = json.loads((folder / CONFIG).read_text())
    kept = {key: value for key, value in (config | changes).items() if value != "absent"}
    (folder / CONFIG).write_text(json.dumps(kept))


def refusal(folder: Path, spec=None, kind: type[PacelineError] = UsageError) -> str:
    with pytest.raises(kind) as caught:
        open_adapter(folder, spec or spec_of())
    assert type(caught.value) is kind
    return str(caught.value)


def test_what_is_written(folder):
    config = json.loads((folder / CONFIG).read_text())
    assert config == {
        "base_model_name_or_path": MODEL,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": 5.0,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": 3,
        "target_modules": [
            *("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")
        ],
        "task_type": "CAUSAL_LM",
    }
    assert is_adapter(folder)
    assert not is_adapter(folder.parent)
    assert base_model(folder) == MODEL


def test_whole_names_where_short_ones_would_mean_more(tmp_path):
    config = replace(config_of("lora"), targets=("blocks.1.ffn.up",))
    write_adapter(tmp_path, spec_of(), config, MODEL, added_tensors(spec_of(), config))
    written = json.loads((tmp_path / CONFIG).read_text())["target_modules"]
    assert written == ["model.layers.1.mlp.up_proj"]


def test_missing_files(folder, tmp_path):
    assert f"{tmp_path / CONFIG}: no such file" in refusal(tmp_path)
    (folder / TENSORS).unlink()
    message = refusal(folder)
    assert message.startswith(f"{folder / TENSORS}: no such file")
    assert "adapter_model.bin is not read" in message


@pytest.mark.parametrize("text", ["{", "[]", "", "\xff"])
def test_a_config_that_is_no_json_object(folder, text):
    (folder / CONFIG).write_bytes(text.encode("latin-1"))
    assert str(folder / CONFIG) in refusal(folder, kind=DataError)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_truncated_tensors(folder, share):
    content = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(content[: int(share * len(content))])
    message = refusal(folder, kind=DataError)
    assert message.startswith(f"{folder / TENSORS} is not a whole safetensors file")


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("peft_type", "absent", "peft_type = None: must be a text"),
        ("r", 0, "r = 0: must be a positive integer"),
        ("r", True, "r = True: must be a positive integer"),
        ("r", "absent", "r = None: must be a positive integer"),
        ("lora_alpha", "8", "lora_alpha = '8': must be a number"),
        ("lora_alpha", -1, "lora_alpha = -1: must be positive and finite"),
        ("target_modules", 3, "target_modules = 3: must be a list of names"),
        ("target_modules", ["q_proj", 1], "target_modules = ['q_proj', 1]: must be a list"),
        ("target_modules", "(", "target_modules = '('"),
        ("layers_to_transform", ["a"], "layers_to_transform = ['a']: must be layer numbers"),
        ("use_rslora", "yes", "use_rslora = 'yes': must be true or false"),
    ],
)
def test_options_that_make_no_sense(folder, key, value, rule):
    change(folder, **{key: value})
    assert refusal(folder, kind=DataError).startswith(f"{folder / CONFIG}: {rule}")


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("peft_type", "VERA", "peft_type 'VERA' is not built in this version"),
        ("task_type", "SEQ_CLS", "task_type = 'SEQ_CLS' is not built"),
        ("init_lora_weights", "pissa", "init_lora_weights = 'pissa' is not built"),
        ("rank_pattern", {"q_proj": 4}, "rank_pattern = {'q_proj': 4} is not built"),
        ("target_modules", ["query_key_value"], "target_modules = ['query_key_value'] names no"),
        ("layers_to_transform", [8], "target_modules = "),
        ("lora_dropout_novelty", 0.5, "lora_dropout_novelty = 0.5 is not built"),
    ],
)
def test_options_that_are_not_computed(folder, key, value, rule):
    change(folder, **{key: value})
    assert refusal(folder).startswith(f"{folder / CONFIG}: {rule}")


def test_another_model_s_adapter_names_the_first_tensor_and_both_shapes(folder):
    message = refusal(folder, replace(spec_of(), d_model=96))
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert f"{key} has shape (3, 48), but the model wants (3, 96)" in message
    assert "the adapter belongs to another model" in message
    message = refusal(folder, replace(spec_of(), num_layers=4))
    assert "has no tensor base_model.model.model.layers.3.self_attn.q_proj.lora_A" in message
    assert "of which the model wants shape (3, 48)" in message
    message = refusal(folder, replace(spec_of(), num_layers=2))
    key = "base_model.model.model.layers.2.mlp.down_proj.lora_A.weight"
    assert f"the model has no place for {key} of shape (3, 136)" in message
    assert "names no layer of a gpt2 model" in refusal(folder, spec_of("gpt2"))


def test_a_tensor_too_few_or_too_many(folder):
    tensors = load_file(folder / TENSORS)
    key = sorted(tensors)[5]
    save_file({name: value for name, value in tensors.items() if name != key}, folder / TENSORS)
    assert f"has no tensor {key}" in refusal(folder)
    save_file(tensors | {"lm_head.weight": tensors[key].clone()}, folder / TENSORS)
    assert "the model has no place for lm_head.weight" in refusal(folder)


@pytest.mark.parametrize(
    ("method", "key"),
    [("prompt", "token_dim"), ("prompt", "num_layers"), ("prefix", "num_attention_heads")],
)
def test_virtual_tokens_of_another_model(tmp_path, method, key):
    folder = write(tmp_path / "adapter", method)
    change(folder, **{key: 1000})
    assert f"{key} = 1000, but the model's is " in refusal(folder)


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_virtual_tokens_that_fill_the_context(tmp_path, method):
    folder = write(tmp_path / "adapter", method)
    message = refusal(folder, replace(spec_of(), max_positions=7))
    assert "7 virtual tokens leave nothing of a context of 7" in message


def test_inputs_scaled_elsewhere_are_refused(tmp_path):
    folder = write(tmp_path / "adapter", "ia3")
    change(folder, feedforward_modules=["k_proj"])
    assert "feedforward_modules = ['k_proj'] is not built" in refusal(folder)


def test_a_projected_prefix_is_refused(tmp_path):
    folder = write(tmp_path / "adapter", "prefix")
    change(folder, prefix_projection=True)
    assert "prefix_projection = True is not built in this version" in refusal(folder)


def test_a_fused_matrix_is_refused(folder):
    change(folder, target_modules=["c_attn"])
    message = refusal(folder, spec_of("gpt2"))
    assert "blocks.0.attention.query is a part of transformer.h.0.attn.c_attn" in message


def test_an_adapter_names_its_base_model(folder):
    source = resolve_adapted(str(folder))
    assert (source.name, source.spec) == (str(folder), resolve(MODEL).spec)
    assert source.adapter is not None
    assert source.adapter.config.rank == 3
    explicit = resolve_adapted(MODEL, folder)
    assert explicit.adapter is not None
    assert (explicit.name, explicit.adapter.config) == (MODEL, source.adapter.config)
    assert resolve_adapted(MODEL).adapter is None


def test_a_base_model_that_is_not_there(folder):
    change(folder, base_model_name_or_path="/no/where")
    with pytest.raises(UsageError) as caught:
        resolve_adapted(str(folder))
    assert f"the base of {folder}, '/no/where': unknown model '/no/where'" in str(caught.value)
    assert f"hint: give the model, and --adapter {folder}" in str(caught.value)
    change(folder, base_model_name_or_path=None)
    with pytest.raises(UsageError, match="names no base_model_name_or_path"):
        resolve_adapted(str(folder))


def test_an_adapter_is_no_model_by_itself(folder):
    with pytest.raises(UsageError, match="is an adapter, which is no model by itself"):
        resolve(str(folder))
    with pytest.raises(UsageError, match="is an adapter itself"):
        resolve_adapted(str(folder), folder)
