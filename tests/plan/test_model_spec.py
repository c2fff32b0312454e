from __future__ import annotations

from typing import Any

import pytest

from paceline.plan.model_spec import ModelSpec, RopeScaling


def spec_of(sizes: str, **others: Any) -> ModelSpec:
    """A spec of sizes in the order vocabulary, width, layers, heads, KV heads, head, FFN."""
    V, D, L, N, K, H, F = map(int, sizes.split())
    return ModelSpec(
        family="llama",
        vocab_size=V,
        d_model=D,
        num_layers=L,
        num_heads=N,
        num_kv_heads=K,
        head_dim=H,
        d_ffn=F,
        max_positions=4096,
        **others,
    )


SMOLLM2_135M = spec_of("49152 576 30 9 3 64 1536", tied_embeddings=True)
LLAMA_31_8B = spec_of(
    "128256 4096 32 32 8 128 14336",
    rope_theta=500000.0,
    rope_scaling=RopeScaling(
        kind="llama3", factor=8.0, low_factor=1.0, high_factor=4.0, original_positions=8192
    ),
)
LLAMA_2_7B = spec_of("32000 4096 32 32 32 128 11008")
TINY = "10 8 3 2 1 3 5"  # heads narrower than the stream; few enough to count by hand


@pytest.mark.parametrize(
    ("spec", "num_parameters", "kv_bytes"),
    [
        (SMOLLM2_135M, 134_515_008, 2 * 30 * 3 * 64 * 2),
        (LLAMA_31_8B, 8_030_261_248, 131_072),
        (LLAMA_2_7B, 6_738_415_616, 524_288),
    ],
    ids=["SmolLM2-135M", "Llama-3.1-8B", "Llama-2-7B"],
)
def test_published_sizes(spec, num_parameters, kv_bytes):
    assert spec.num_parameters == num_parameters
    assert spec.num_active_parameters == num_parameters
    assert spec.kv_bytes_per_token("bfloat16") == kv_bytes
    for dtype, size in {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}.items():
        assert spec.parameter_bytes(dtype) == size * num_parameters
    assert spec.gradient_bytes("float32") == 4 * num_parameters
    assert spec.optimizer_bytes("float32") == 8 * num_parameters


def test_a_block_by_hand():
    spec = spec_of(TINY)
    assert (spec.d_query, spec.d_kv) == (6, 3)
    # query and output 2 * 8 * 6, key and value 2 * 8 * 3, gate, up and down 3 * 8 * 5
    assert spec.attention_matrix_parameters == 96 + 48
    assert spec.ffn_matrix_parameters(0, active=True) == 120
    # two norms of 8 a block; embedding, head, last norm
    assert spec.num_parameters == 3 * (264 + 16) + 80 + 80 + 8


@pytest.mark.parametrize(
    ("flag", "difference"),
    [
        ("tied_embeddings", -10 * 8),
        ("qkv_bias", 3 * (6 + 3 + 3)),
        ("output_bias", 3 * 8),
        ("ffn_bias", 3 * (5 + 5 + 8)),
    ],
)
def test_flags_change_the_count(flag, difference):
    plain = spec_of(TINY).num_parameters
    assert spec_of(TINY, **{flag: True}).num_parameters == plain + difference


def test_flops_of_smollm2_by_hand():
    spec, length = SMOLLM2_135M, 2048
    # a block: 2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536 = 3_538_944 weights;
    # 30 blocks and the head of 49152 * 576: 134_479_872 multiply-adds a token
    matrices = 268_959_744
    # scores and values: 2 products x 2 FLOPs x 30 layers x 576 wide x 1024.5 keys on average
    attention = 70_813_440
    forward = matrices + attention
    assert spec.attention_flops_per_token(length) == attention
    assert spec.forward_flops_per_token(length) == forward
    assert spec.backward_flops_per_token(length) == 2 * forward
    assert spec.backward_flops_per_token(length, remat="none") == 2 * forward
    assert spec.backward_flops_per_token(length, remat="selective") == 2 * forward + attention
    assert spec.backward_flops_per_token(length, remat="full") == 3 * forward
    assert spec.model_flops_per_token(length) == 3 * forward == 1_019_319_552


@pytest.mark.parametrize("length", [1, 2, 7])
def test_attention_counts_the_pairs_of_the_causal_mask(length):
    spec = spec_of(TINY)
    num_pairs = sum(1 for query in range(length) for key in range(length) if key <= query)
    products = 2 * num_pairs * spec.num_heads * spec.head_dim * spec.num_layers
    assert spec.attention_flops_per_token(length) * length == 2 * products


def test_a_tied_head_costs_as_much_as_an_untied_one():
    tied = spec_of(TINY, tied_embeddings=True)
    flops = spec_of(TINY).forward_flops_per_token(4)
    assert tied.forward_flops_per_token(4) == flops


def test_stretched_rotary_frequencies_can_be_read():
    assert ModelSpec.from_dict(LLAMA_31_8B.to_dict()) == LLAMA_31_8B
