"""The decoder against transformers' Llama, in float32 on the CPU: 2e-5 on logits of size 1."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from llamas import change_config, load, make_llama, save_folder, to_old_style

from paceline.core.errors import UsageError
from paceline.models.hub import resolve
from paceline.models.layout import PADDING, Layout
from paceline.models.rope import rotary_angles
from paceline.models.weights import RandomWeights, build, fill

pytestmark = pytest.mark.cpu

BOUND = 2e-5
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
VARIANTS = {
    "gqa-tied": {},
    "mha-untied": {"num_key_value_heads": 6, "tie_word_embeddings": False},
    "mqa": {"num_key_value_heads": 1, "rms_norm_eps": 1e-3},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "attention-bias": {"attention_bias": True, "tie_word_embeddings": False},
    "mlp-bias": {"mlp_bias": True},
    "wide-heads": {"head_dim": 14, "intermediate_size": 61},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 123.0}},
    "llama3": {"head_dim": 16, "rope_parameters": LLAMA3},
}


def random_tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, 259, shape, generator=torch.Generator().manual_seed(1))


def difference(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left - right).abs().max())


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A model of transformers, and ours from its folder."""
    theirs = make_llama()
    return theirs, load(save_folder(theirs, tmp_path_factory.mktemp("llama")))


@torch.no_grad()
@pytest.mark.parametrize("style", ["new", "old"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_those_of_transformers(tmp_path, variant, style):
    theirs = make_llama(**VARIANTS[variant])
    folder = save_folder(theirs, tmp_path / "llama")
    if style == "old":
        to_old_style(folder)
    ours = load(folder)
    tokens_BT = random_tokens(3, 67)
    expected = theirs(tokens_BT).logits
    assert expected.std() > 0.5  # or the bound would say little
    assert difference(ours(tokens_BT), expected) <= BOUND


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padding_changes_nothing(pair, side):
    theirs, ours = pair
    length, lengths = 41, [41, 1, 23, 40]
    tokens_BT = random_tokens(len(lengths), length)
    mask_BT = torch.zeros_like(tokens_BT)
    for row, count in enumerate(lengths):
        start = {"left": length - count, "right": 0, "both": (length - count) // 2}[side]
        mask_BT[row, start : start + count] = 1
    positions_BT = (mask_BT.cumsum(dim=1) - 1).clamp(min=0)
    expected = theirs(tokens_BT, attention_mask=mask_BT, position_ids=positions_BT).logits
    layout = Layout.of_documents(torch.where(mask_BT == 1, 0, PADDING))
    logits = ours(tokens_BT, layout)
    assert torch.isfinite(logits).all()
    assert difference(logits[mask_BT == 1], expected[mask_BT == 1]) <= BOUND
    # And the padding's own tokens are seen by nobody.
    others_BT = torch.where(mask_BT == 1, tokens_BT, 7)
    assert torch.equal(ours(others_BT, layout)[mask_BT == 1], logits[mask_BT == 1])


@torch.no_grad()
def test_packed_documents_are_as_if_alone(pair):
    theirs, ours = pair
    lengths = [5, 1, 19, 2, 8]
    documents = [n for n, length in enumerate(lengths) for _ in range(length)] + [PADDING] * 4
    tokens_BT = random_tokens(2, len(documents))
    documents_BT = torch.tensor([documents, documents[::-1]])
    packed = ours(tokens_BT, Layout.of_documents(documents_BT))
    for row in range(2):
        for document in range(len(lengths)):
            alone = tokens_BT[row][documents_BT[row] == document][None]
            part = packed[row][documents_BT[row] == document][None]
            assert difference(part, ours(alone)) <= BOUND
            assert difference(part, theirs(alone).logits) <= BOUND


def test_positions_start_anew_with_each_document():
    documents_BT = torch.tensor([[0, 0, 1, 1, 1, PADDING], [PADDING, 4, 4, 0, PADDING, PADDING]])
    layout = Layout.of_documents(documents_BT)
    assert layout.positions_BT.tolist() == [[0, 1, 0, 1, 2, 0], [0, 0, 1, 0, 0, 1]]
    sees = layout.mask_B1TT()[0, 0].int().tolist()
    assert sees[4] == [0, 0, 1, 1, 1, 0]
    assert sees[1] == [1, 1, 0, 0, 0, 0]
    assert Layout.whole_rows(documents_BT).mask_B1TT() is None


@torch.no_grad()
def test_the_last_position_alone(pair):
    _, ours = pair
    tokens_BT = random_tokens(2, 30)
    last_B1V = ours(tokens_BT, last_only=True)
    assert last_B1V.shape == (2, 1, 259)
    assert difference(last_B1V[:, 0], ours(tokens_BT)[:, -1]) <= BOUND


@torch.no_grad()
def test_weights_are_cast_as_they_are_used(pair, tmp_path):
    """Master weights in float32 under bfloat16 compute give the bits of bfloat16 weights."""
    theirs, ours = pair
    narrow = load(save_folder(theirs, tmp_path / "llama")).to(torch.bfloat16)
    tokens_BT = random_tokens(2, 30)
    ours.compute_dtype = torch.bfloat16
    try:
        logits = ours(tokens_BT)
    finally:
        ours.compute_dtype = None
    assert logits.dtype == torch.bfloat16
    assert torch.equal(logits, narrow(tokens_BT))
    assert 1e-4 < difference(logits.float(), ours(tokens_BT)) < 0.5


def test_tied_weights_are_one_parameter(pair):
    _, ours = pair
    assert "head.weight" not in dict(ours.named_parameters())
    ours(random_tokens(1, 4)).square().sum().backward()
    gradient_VD = ours.embedding.weight.grad
    ours.zero_grad()
    assert (gradient_VD.abs().sum(dim=1) > 0).all()  # rows that were not read, too: as the head


def test_angles_are_those_of_float32_whatever_the_dtype():
    spec = resolve("random:llama:tiny").spec
    positions_BT = torch.tensor([[0, 1, 511]])
    sizes = {"head_dim": spec.head_dim, "theta": spec.rope_theta, "scaling": None}
    wide_cos, wide_sin = rotary_angles(positions_BT, **sizes, dtype=torch.float32)
    cos, sin = rotary_angles(positions_BT, **sizes, dtype=torch.bfloat16)
    assert torch.equal(cos, wide_cos.bfloat16())
    assert torch.equal(sin, wide_sin.bfloat16())
    assert wide_cos.shape == (1, 3, 1, spec.head_dim)


def test_random_weights_are_functions_of_seed_and_name():
    spec = resolve("random:llama:tiny").spec
    shallow = dataclasses.replace(spec, num_layers=1)
    names = [name for name, _ in build(shallow).named_parameters()]
    first, again = RandomWeights(spec, 5), RandomWeights(shallow, 5)
    for name in reversed(names):
        assert torch.equal(first.read(name), again.read(name))
    matrix = first.read("blocks.0.ffn.up.weight")
    assert not torch.equal(matrix, RandomWeights(spec, 6).read("blocks.0.ffn.up.weight"))
    assert not torch.equal(matrix, first.read("blocks.0.ffn.gate.weight"))
    # 6528 draws: the deviation of a deviation is 0.02 / sqrt(2 * 6528) = 1.8e-4.
    assert abs(float(matrix.std()) - spec.initializer_std) < 5 * 1.8e-4


def test_every_parameter_is_filled():
    source = resolve("random:llama:tiny")
    model = build(source.spec)
    assert all(parameter.is_meta for parameter in model.parameters())
    fill(model, source.weights, torch.device("cpu"))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, source.weights.read(name))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_act": "gelu"}, "gelu"),
        ({"model_type": "lama"}, "lama"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor"),
        ({"hidden_size": "48"}, "48"),
        ({"num_attention_heads": 0}, "num_heads"),
        ({"num_key_value_heads": 4}, "num_kv_heads"),
        ({"head_dim": 7}, "head_dim"),
        ({"vocab_size": None}, "vocab_size"),
    ],
)
def test_a_config_that_is_not_computed_is_refused(tmp_path, changes, named):
    folder = save_folder(make_llama(), tmp_path / "llama")
    change_config(folder, **changes)
    with pytest.raises(UsageError, match=named) as caught:
        resolve(str(folder))
    assert str(folder / "config.json") in caught.value.message
