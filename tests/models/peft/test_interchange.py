"""Adapters of the `peft` library compute here what they compute there, and ours do there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from adapted import CPU, MERGED, difference, tokens
from safetensors.torch import load_file

from paceline.core.errors import UsageError
from paceline.models.adapters import adapt
from paceline.models.decoder import Decoder
from paceline.models.hf import FolderWeights, read_spec
from paceline.models.layout import PADDING, Layout
from paceline.models.peft.attach import attach
from paceline.models.peft.files import Adapter, open_adapter, write_adapter
from paceline.models.weights import TensorWeights, build, fill
from paceline.plan.plan import PeftConfig

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:peft"),
]

BOUND = 1e-5
LENGTH = 19  # beyond every window below
SIZES = {
    "vocab_size": 99,
    "hidden_size": 24,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
KINDS = ["sliding_attention", "full_attention", "sliding_attention"]
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "qwen2": lambda: transformers.Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=5, max_window_layers=1
    ),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **SIZES, head_dim=8, sliding_window=9, layer_types=KINDS, query_pre_attn_scalar=11
    ),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=99, n_embd=24, n_layer=3, n_head=4, n_positions=64, n_inner=50
    ),
    "mixtral": lambda: transformers.MixtralConfig(**SIZES, num_local_experts=3, sliding_window=6),
}
THEIRS = {
    "llama": ["k_proj", "v_proj", "down_proj"],
    "qwen2": ["k_proj", "o_proj", "down_proj"],
    "gemma3": ["q_proj", "gate_proj", "down_proj"],
    "gpt2": ["c_fc", "mlp.c_proj"],
    "mixtral": ["k_proj", "v_proj"],
}
METHODS = [*MERGED, "prompt", "prefix"]


@pytest.fixture(scope="module", params=CONFIGS)
def base(request, tmp_path_factory) -> Path:
    """A random model of `transformers`, norms and biases included, as a folder."""
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(
        CONFIGS[request.param](), dtype=torch.float32
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.mul_(4.0)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return folder


def load(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def their_config(method: str, targets: list[str], **options: Any) -> Any:
    common = {"task_type": "CAUSAL_LM", **options}
    if method in ("lora", "dora"):
        is_dora = method == "dora"
        return peft.LoraConfig(r=4, target_modules=targets, use_dora=is_dora, **common)
    if method == "ia3":
        scaled = [name for name in targets if name in ("down_proj", "mlp.c_proj")]
        return peft.IA3Config(target_modules=targets, feedforward_modules=scaled, **common)
    kind = peft.PromptTuningConfig if method == "prompt" else peft.PrefixTuningConfig
    return kind(num_virtual_tokens=7, **common)


def their_model(folder: Path, config: Any) -> Any:
    """A model of `peft`'s whose every new parameter is away from its start."""
    torch.manual_seed(4)
    model = peft.get_peft_model(load(folder), config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def their_logits(model: Any, tokens_BT: torch.Tensor, **options: Any) -> torch.Tensor:
    """Without those of the virtual tokens of a prompt, which come first."""
    return model(tokens_BT, **options).logits[:, -tokens_BT.shape[1] :]


def our_model(folder: Path, adapter: Adapter) -> Decoder:
    spec = read_spec(folder)
    model = build(spec)
    weights = FolderWeights(folder, spec)
    fill(model, attach(model, adapter.config, weights, added=adapter).weights, CPU)
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_both_ways(base, method, tmp_path):
    family = read_spec(base).family
    theirs = their_model(base, their_config(method, THEIRS[family]))
    theirs.save_pretrained(tmp_path / "theirs")
    adapter = open_adapter(tmp_path / "theirs", read_spec(base))
    assert adapter.config.method == method
    ours = our_model(base, adapter)
    ids = tokens(2, LENGTH, 99)
    expected = their_logits(theirs, ids)
    assert difference(expected, load(base)(ids).logits) > 0.05  # the adapter does something
    assert difference(ours(ids), expected) <= BOUND

    mask_BT = torch.ones(2, LENGTH, dtype=torch.long)
    mask_BT[1, -6:] = 0
    documents_BT = torch.where(mask_BT == 1, 0, PADDING)
    padded = ours(ids, Layout.of_documents(documents_BT))
    expected_padded = their_logits(theirs, ids, attention_mask=mask_BT)
    is_text = mask_BT.bool()
    assert difference(padded[is_text], expected_padded[is_text]) <= BOUND

    (tmp_path / "ours").mkdir()
    write_adapter(tmp_path / "ours", read_spec(base), adapter.config, str(base), adapter.tensors)
    left, right = (
        load_file(tmp_path / side / "adapter_model.safetensors") for side in ("theirs", "ours")
    )
    assert left.keys() == right.keys()
    assert all(torch.equal(value, right[key]) for key, value in left.items())
    back = peft.PeftModel.from_pretrained(load(base), tmp_path / "ours").eval()
    assert difference(their_logits(back, ids), expected) == 0


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_usual_targets_go_there(base, method, tmp_path):
    """What our own defaults adapt, `peft` finds in the file; GPT-2's fused matrix is refused."""
    from paceline.models.weights import RandomWeights

    spec, config = read_spec(base), PeftConfig(method=method, virtual_tokens=5)
    model = build(spec)
    attached = attach(model, config, RandomWeights(spec))
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name in attached.added:
        value = attached.weights.read(name)
        tensors[name] = value + 0.1 * torch.randn(value.shape, generator=generator)
    if spec.family == "gpt2" and method in MERGED:
        with pytest.raises(UsageError, match=r"is a part of transformer\.h\.0\.attn\.c_attn"):
            write_adapter(tmp_path, spec, config, str(base), tensors)
        return
    write_adapter(tmp_path, spec, config, str(base), tensors)
    ours = build(spec)
    weights = FolderWeights(base, spec)
    fill(ours, attach(ours, config, weights, added=TensorWeights(tensors)).weights, CPU)
    theirs = peft.PeftModel.from_pretrained(load(base), tmp_path).eval()
    ids = tokens(2, LENGTH, 99)
    assert difference(ours(ids), load(base)(ids).logits) > 0.01
    assert difference(their_logits(theirs, ids), ours(ids)) <= BOUND


OPTIONS = {
    "rslora": {"use_rslora": True, "lora_alpha": 3},
    "some layers": {"layers_to_transform": [0, 2]},
    "one layer": {"layers_to_transform": 1},
    "dropout": {"lora_dropout": 0.1},
    "gaussian": {"init_lora_weights": "gaussian"},
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("llama")
    config = CONFIGS["llama"]()
    config.initializer_range = 0.15
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(
        folder
    )
    return folder


@torch.no_grad()
@pytest.mark.parametrize("option", OPTIONS)
def test_options_that_are_computed(llama, option, tmp_path):
    theirs = their_model(llama, their_config("lora", ["q_proj"], **OPTIONS[option]))
    theirs.save_pretrained(tmp_path)
    ours = our_model(llama, open_adapter(tmp_path, read_spec(llama)))
    ids = tokens(2, LENGTH, 99)
    assert difference(ours(ids), their_logits(theirs, ids)) <= BOUND


def test_a_regular_expression_of_targets(llama, tmp_path):
    theirs = their_model(llama, their_config("lora", r".*\.[01]\..*\.(q|down)_proj"))
    theirs.save_pretrained(tmp_path)
    adapter = open_adapter(tmp_path, read_spec(llama))
    assert adapter.config.targets == (
        "blocks.0.attention.query",
        "blocks.0.ffn.down",
        "blocks.1.attention.query",
        "blocks.1.ffn.down",
    )
    ids = tokens(2, LENGTH, 99)
    with torch.no_grad():
        expected = their_logits(theirs, ids)
        assert difference(our_model(llama, adapter)(ids), expected) <= BOUND


REFUSED = {
    "rank_pattern": {"rank_pattern": {"q_proj": 2}},
    "alpha_pattern": {"alpha_pattern": {"q_proj": 3}},
    "bias": {"bias": "all"},
    "lora_bias": {"lora_bias": True},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "exclude_modules": {"exclude_modules": ["model.layers.0.self_attn.q_proj"]},
}


@pytest.mark.parametrize("option", REFUSED)
def test_options_that_are_not_computed_are_refused_by_name(llama, option, tmp_path):
    theirs = their_model(llama, their_config("lora", ["q_proj"], **REFUSED[option]))
    theirs.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=rf"{option} = .* is not built in this version"):
        open_adapter(tmp_path, read_spec(llama))


def test_a_whole_source_with_an_adapter(llama, tmp_path):
    """Merged at load, as the engine does it."""
    from paceline.models.hub import ModelSource
    from paceline.models.tokenizer import byte_tokenizer

    theirs = their_model(llama, their_config("lora", ["q_proj"]))
    theirs.save_pretrained(tmp_path)
    spec = read_spec(llama)
    adapter = open_adapter(tmp_path, spec)
    source = ModelSource("x", spec, FolderWeights(llama, spec), byte_tokenizer(), {}, adapter)
    model = build(spec)
    fill(model, adapt(model, source), CPU)
    assert {name for name, _ in model.named_parameters()} == {
        name for name, _ in build(spec).named_parameters()
    }
    ids = tokens(2, LENGTH, 99)
    with torch.no_grad():
        assert difference(model(ids), their_logits(theirs, ids)) <= BOUND


def test_their_config_is_read_without_its_version(llama, tmp_path):
    """Keys of later versions are let be while they are off."""
    theirs = their_model(llama, their_config("lora", ["q_proj"]))
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"novelty": None, "other_novelty": False}))
    open_adapter(tmp_path, read_spec(llama))
    path.write_text(json.dumps(config | {"novelty": 3}))
    with pytest.raises(UsageError, match="novelty = 3 is not built in this version"):
        open_adapter(tmp_path, read_spec(llama))
