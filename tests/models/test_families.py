"""Every family computes what `transformers` computes, and goes out as it came in."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

from paceline.decode.cache import ContiguousCache
from paceline.models.families import FAMILIES, family
from paceline.models.hf import WEIGHTS_FILE, FolderWeights, read_spec, write_weights
from paceline.models.hub import resolve
from paceline.models.layout import PADDING, Layout
from paceline.models.weights import build, fill
from paceline.plan.plan import Plan
from paceline.verify.certify import BOUND as VERIFY_BOUND
from paceline.verify.certify import certify

pytestmark = pytest.mark.cpu

BOUND = 1e-5
LENGTH = 23  # beyond every window below
CPU = torch.device("cpu")

SIZES = {
    "vocab_size": 99,
    "hidden_size": 24,
    "intermediate_size": 44,  # their grouped product wants rows of whole 16 bytes
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
KINDS = ["sliding_attention", "full_attention", "sliding_attention"]
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 20, "num_experts": 5}
SCALED = {"rope_type": "linear", "factor": 3.0, "rope_theta": 50000.0}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SIZES, rope_parameters=SCALED),
    "mistral": lambda: transformers.MistralConfig(**SIZES, sliding_window=7),
    "qwen2": lambda: transformers.Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=5, max_window_layers=1
    ),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, head_dim=10, attention_bias=True),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **SIZES, head_dim=8, sliding_window=5, layer_types=KINDS, query_pre_attn_scalar=11
    ),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=99, n_embd=24, n_layer=3, n_head=4, n_positions=64, n_inner=50
    ),
    "olmo2": lambda: transformers.Olmo2Config(**SIZES),
    "mixtral": lambda: transformers.MixtralConfig(**SIZES, num_local_experts=3, sliding_window=6),
    "qwen2-moe": lambda: transformers.Qwen2MoeConfig(
        **SIZES, **MOE, mlp_only_layers=[0], shared_expert_intermediate_size=28
    ),
    "qwen3-moe": lambda: transformers.Qwen3MoeConfig(
        **SIZES, **MOE, head_dim=6, mlp_only_layers=[0], norm_topk_prob=True
    ),
}


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request, tmp_path_factory):
    """A random model of `transformers`, norms and biases included, and ours from its folder."""
    torch.manual_seed(3)
    config = CONFIGS[request.param]()
    theirs = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.mul_(4.0)
    folder = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder)
    spec = read_spec(folder)
    assert spec.family == request.param
    ours = build(spec)
    fill(ours, FolderWeights(folder, spec), CPU)
    return theirs, ours


def tokens(rows: int, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(0, 99, (rows, length), generator=torch.Generator().manual_seed(5))


def difference(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left - right).abs().max())


def test_every_family_is_tried():
    """`transformers` has no model with grouped experts: see test_moe.py."""
    assert set(CONFIGS) == set(FAMILIES) - {"pangu-moe"}


@torch.no_grad()
def test_logits(pair):
    theirs, ours = pair
    expected = theirs(tokens(2)).logits
    assert float(expected.std()) > 0.1
    assert difference(ours(tokens(2)), expected) <= BOUND


@torch.no_grad()
def test_padding_on_either_side(pair):
    theirs, ours = pair
    documents_BT = torch.zeros(2, LENGTH, dtype=torch.long)
    documents_BT[0, :4] = PADDING
    documents_BT[1, -6:] = PADDING
    is_text = documents_BT != PADDING
    layout = Layout.of_documents(documents_BT)
    expected = theirs(
        tokens(2), attention_mask=is_text.long(), position_ids=layout.positions_BT
    ).logits
    assert difference(ours(tokens(2), layout)[is_text], expected[is_text]) <= BOUND


@torch.no_grad()
def test_packed_documents_are_as_if_alone(pair):
    theirs, ours = pair
    lengths = (9, 1, 13)
    documents_T = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    packed = ours(tokens(1), Layout.of_documents(documents_T[None]))
    for start, length in zip((0, 9, 10), lengths, strict=True):
        alone = theirs(tokens(1)[:, start : start + length]).logits
        assert difference(packed[:, start : start + length], alone) <= BOUND


@torch.no_grad()
@pytest.mark.parametrize("cuts", [(1,) * LENGTH, (3, 8, 1, 1, 7, 3), (LENGTH,)], ids=str)
def test_cached_is_uncached(pair, cuts):
    _, ours = pair
    cache = ContiguousCache(ours.spec, torch.float32, CPU)
    parts = []
    for count in cuts:
        start = cache.num_tokens
        positions_T = torch.arange(start, start + count)
        part = tokens(1)[:, start : start + count]
        parts.append(ours(part, Layout(positions_T[None]), attend=cache.attend))
        cache.commit(count)
    assert difference(torch.cat(parts, dim=1), ours(tokens(1))) <= BOUND


@torch.no_grad()
def test_out_as_it_came_in(pair, tmp_path):
    theirs, ours = pair
    spec = ours.spec
    config = family(spec.family).config_from_spec(spec) | {"dtype": "float32"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    named = ((name, p.detach()) for name, p in ours.named_parameters())
    write_weights(tmp_path / WEIGHTS_FILE, spec, named, torch.float32)
    assert read_spec(tmp_path) == spec
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert difference(back(tokens(2)).logits, theirs(tokens(2)).logits) == 0
    for name, value in theirs.state_dict().items():
        assert torch.equal(back.state_dict()[name], value), name


def test_parameters_are_counted(pair):
    _, ours = pair
    assert sum(p.numel() for p in ours.parameters()) == ours.spec.num_parameters
    is_sparse = ours.spec.moe is not None
    assert (ours.spec.num_active_parameters < ours.spec.num_parameters) == is_sparse


@pytest.mark.parametrize("name", FAMILIES)
def test_a_tiny_random_model_of_every_family_trains_exactly(name):
    source = resolve(f"random:{name}:tiny")
    certificate = certify(Plan(), source.spec, source.weights)
    assert certificate.certified, certificate.worst
    assert certificate.max_rel_grad_error <= VERIFY_BOUND
