"""Every format of a tensor arrives as `gguf` reads it, in Qwen files that this test lays out."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as Kind
from test_gguf import CONTROL, MERGES, TEMPLATE, TOKENS, left_overs

from paceline.core.errors import DataError, UsageError
from paceline.models.hub import locate, resolve
from paceline.models.weights import build, fill

pytestmark = pytest.mark.cpu

SIZES = {
    "vocab_size": len(TOKENS),
    "hidden_size": 256,  # K-quants come in blocks of 256
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
MODELS = {
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES)),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES, head_dim=32)),
}
# llama.cpp's name of each matrix, and the format that it is stored in: each once, and nine in all.
BLOCK = {
    "self_attn.q_proj": ("attn_q", Kind.Q4_K),
    "self_attn.k_proj": ("attn_k", Kind.Q5_K),
    "self_attn.v_proj": ("attn_v", Kind.Q6_K),
    "self_attn.o_proj": ("attn_output", Kind.Q4_0),
    "mlp.gate_proj": ("ffn_gate", Kind.Q4_1),
    "mlp.up_proj": ("ffn_up", Kind.BF16),
    "mlp.down_proj": ("ffn_down", Kind.F16),
    "self_attn.q_norm": ("attn_q_norm", Kind.F32),
    "self_attn.k_norm": ("attn_k_norm", Kind.F32),
    "input_layernorm": ("attn_norm", Kind.F32),
    "post_attention_layernorm": ("ffn_norm", Kind.F32),
}
TOP = {
    "model.embed_tokens": ("token_embd", Kind.Q8_0),
    "model.norm": ("output_norm", Kind.F32),
    "lm_head": ("output", Kind.Q6_K),
}
SCALES = {Kind.Q4_K: (0, 2), Kind.Q5_K: (0, 2), Kind.Q6_K: (208,)}
"""Where a block of a K-quant keeps its scales, in half precision; `gguf` cannot write these."""


def stored_name(published):
    part, suffix = published.rsplit(".", 1)
    if part in TOP:
        name, kind = TOP[part]
    else:
        layer, part = part.removeprefix("model.layers.").split(".", 1)
        name, kind = BLOCK[part]
        name = f"blk.{layer}.{name}"
    return f"{name}.{suffix}", Kind.F32 if suffix == "bias" else kind


def encoded(values, kind, generator):
    """A tensor's bytes in a format: quantised, or for K-quants any blocks with sane scales."""
    if kind not in SCALES:
        return gguf.quantize(values, kind)
    block, size_bytes = gguf.GGML_QUANT_SIZES[kind]
    num_blocks = values.size // block
    blocks = generator.integers(0, 256, (num_blocks, size_bytes), dtype=np.uint8)
    for start in SCALES[kind]:
        scales = generator.uniform(1e-5, 1e-4, (num_blocks, 1)).astype(np.float16)
        blocks[:, start : start + 2] = scales.view(np.uint8)
    return blocks.reshape(values.shape[0], -1)


def write(path, model, architecture, *, kinds=None, without_tokenizer=False):
    """A file as llama.cpp writes it, and what its tensors mean, under published names."""
    generator = np.random.default_rng(3)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(SIZES["max_position_embeddings"])
    writer.add_embedding_length(SIZES["hidden_size"])
    writer.add_block_count(SIZES["num_hidden_layers"])
    writer.add_feed_forward_length(SIZES["intermediate_size"])
    writer.add_head_count(SIZES["num_attention_heads"])
    writer.add_head_count_kv(SIZES["num_key_value_heads"])
    writer.add_rope_freq_base(model.config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    if not without_tokenizer:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("qwen2")
        writer.add_token_list(TOKENS)
        writer.add_token_types([3] * len(CONTROL) + [1] * (len(TOKENS) - len(CONTROL)))
        writer.add_token_merges(MERGES)
        writer.add_eos_token_id(2)
        writer.add_chat_template(TEMPLATE)
    expected = {}
    for published, value in model.state_dict().items():
        name, kind = stored_name(published)
        kind = (kinds or {}).get(name, kind)
        data = encoded(value.numpy(), kind, generator)
        writer.add_tensor(name, data, raw_dtype=kind)
        expected[published] = torch.from_numpy(gguf.dequantize(data, kind).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def make(architecture):
    torch.manual_seed(2)
    model = MODELS[architecture]().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # norms, and Qwen 2's biases
                parameter.copy_(("norm" in name) + 0.2 * torch.randn_like(parameter))
            else:
                parameter.mul_(4.0)
    return model


@torch.no_grad()
@pytest.mark.parametrize("architecture", MODELS)
def test_every_format_and_the_logits(tmp_path, architecture):
    model = make(architecture)
    path = tmp_path / "model.gguf"
    expected = write(path, model, architecture)
    kinds = {kind for _, kind in (BLOCK | TOP).values()}
    assert len(kinds) == 9
    source = resolve(str(path))
    theirs = type(model).from_pretrained(locate(str(path)))
    for published, value in expected.items():
        assert torch.equal(theirs.state_dict()[published], value), published
    model.load_state_dict(expected)
    tokens_BT = torch.randint(0, len(TOKENS), (2, 40), generator=torch.Generator().manual_seed(1))
    logits_BTV = model(tokens_BT).logits
    ours = build(source.spec)
    fill(ours, source.weights, torch.device("cpu"))
    assert 0.5 < float(logits_BTV.std()) < 50
    assert float((ours(tokens_BT) - logits_BTV).abs().max()) <= 1e-4 * float(logits_BTV.std())
    # As llama.cpp cuts text for Qwen: digits alone, spaces in front of words.
    text = "hello hello12é<|im_end|>"
    named = ["hell", "o", "Ġhell", "o", "1", "2", "Ã", "©", "<|im_end|>"]
    assert source.tokenizer.encode(text) == [TOKENS.index(token) for token in named]


def test_a_format_that_is_not_read(tmp_path):
    block, size_bytes = gguf.GGML_QUANT_SIZES[Kind.Q8_K]
    path = tmp_path / "model.gguf"
    write(path, make("qwen3"), "qwen3")
    # The type of a tensor is four bytes in the header, after its name and its shape.
    content = path.read_bytes()
    name = b"blk.1.attn_q.weight"
    at = content.index(name) + len(name) + 4 + 2 * 8
    assert content[at : at + 4] == int(Kind.Q4_K).to_bytes(4, "little")
    assert size_bytes > gguf.GGML_QUANT_SIZES[Kind.Q4_K][1]
    path.write_bytes(content[:at] + int(Kind.Q8_K).to_bytes(4, "little") + content[at + 4 :])
    with pytest.raises(UsageError, match=r"blk\.1\.attn_q\.weight is in Q8_K") as caught:
        locate(str(path))
    assert str(path) in caught.value.message
    assert "Q8_0" in caught.value.hint
    # And one that no version of the format knows.
    path.write_bytes(content[:at] + (999).to_bytes(4, "little") + content[at + 4 :])
    with pytest.raises(DataError, match="999") as unknown:
        locate(str(path))
    assert str(path) in unknown.value.message
    assert left_overs(tmp_path / "cache") == []
    assert block == 256


def test_a_file_without_a_tokenizer(tmp_path):
    path = tmp_path / "model.gguf"
    write(path, make("qwen3"), "qwen3", without_tokenizer=True)
    with pytest.raises(DataError, match=r"lacks the field tokenizer\.ggml\.model") as caught:
        locate(str(path))
    assert str(path) in caught.value.message
    assert left_overs(tmp_path / "cache") == []
