"""GGUF files: what is in them arrives exactly, and nothing from files that are not whole."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from llamas import load, make_llama
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, LlamaForCausalLM

from paceline.core.errors import DataError, UsageError
from paceline.models.hub import locate, resolve, verify_folder

pytestmark = pytest.mark.cpu

HEADS, KV_HEADS = 4, 2
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
}
# llama.cpp's names, and the format that each tensor is stored in.
BLOCK = {
    "input_layernorm": ("attn_norm", Kind.F32),
    "self_attn.q_proj": ("attn_q", Kind.Q8_0),
    "self_attn.k_proj": ("attn_k", Kind.Q4_1),
    "self_attn.v_proj": ("attn_v", Kind.F16),
    "self_attn.o_proj": ("attn_output", Kind.BF16),
    "post_attention_layernorm": ("ffn_norm", Kind.F32),
    "mlp.gate_proj": ("ffn_gate", Kind.Q4_1),
    "mlp.up_proj": ("ffn_up", Kind.Q8_0),
    "mlp.down_proj": ("ffn_down", Kind.F32),
}
TOP = {
    "model.embed_tokens": ("token_embd", Kind.Q8_0),
    "model.norm": ("output_norm", Kind.F32),
    "lm_head": ("output", Kind.Q4_1),
}
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["h e", "l l", "he ll", "1 2", "Ġ hell"]
TOKENS = [
    *CONTROL,
    *sorted(pre_tokenizers.ByteLevel.alphabet()),
    *(merge.replace(" ", "") for merge in MERGES),
]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"


def kind_of(published: str) -> tuple[str, Kind]:
    """A tensor's name in the file, and its format."""
    part, suffix = published.rsplit(".", 1)
    if part in TOP:
        name, kind = TOP[part]
        return f"{name}.{suffix}", kind
    layer, part = part.removeprefix("model.layers.").split(".", 1)
    name, kind = BLOCK[part]
    return f"blk.{layer}.{name}.{suffix}", kind if suffix == "weight" else Kind.F32


def llama_cpp_rows(values: np.ndarray, num_heads: int) -> np.ndarray:
    """What llama.cpp's convert_hf_to_gguf.py does to query and key rows (`permute`)."""
    rows = values.reshape(num_heads, 2, values.shape[0] // num_heads // 2, *values.shape[1:])
    return rows.swapaxes(1, 2).reshape(values.shape)


def heads_of(published: str) -> int | None:
    return {"q_proj": HEADS, "k_proj": KV_HEADS}.get(published.split(".")[-2])


def write_gguf(
    path, model, *, without=(), pre="gpt-2", architecture="llama", fields=(), extra=None
):
    """A file as llama.cpp writes it."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(512)
    writer.add_embedding_length(SIZES["hidden_size"])
    writer.add_block_count(SIZES["num_hidden_layers"])
    writer.add_feed_forward_length(SIZES["intermediate_size"])
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(CONTROL) + [1] * (len(TOKENS) - len(CONTROL)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
    for key, value in fields:
        writer.add_float32(key, value)
    for published, value in model.state_dict().items():
        name, kind = kind_of(published)
        if name in without or (published == "lm_head.weight" and model.config.tie_word_embeddings):
            continue
        values = value.numpy()
        if heads := heads_of(published):
            values = llama_cpp_rows(values, heads)
        writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def expected_weight(published: str, value: torch.Tensor) -> np.ndarray:
    """What a tensor's format makes of it, in the published order of rows."""
    _, kind = kind_of(published)
    values = value.numpy()
    if heads := heads_of(published):
        rows = llama_cpp_rows(np.arange(values.shape[0]), heads)
        stored = gguf.dequantize(gguf.quantize(values[rows], kind), kind)
        return stored[np.argsort(rows)]
    return gguf.dequantize(gguf.quantize(values, kind), kind)


def llama(**changes):
    return make_llama(**SIZES, vocab_size=len(TOKENS), **changes)


def left_overs(cache):
    """What stands under a final name among converted models."""
    return [path.name for path in cache.rglob("converted/*") if not path.name.startswith(".")]


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@torch.no_grad()
@pytest.mark.parametrize(
    "changes",
    [
        {"tie_word_embeddings": True},
        {"tie_word_embeddings": False},
        {"attention_bias": True, "mlp_bias": True},
    ],
    ids=["tied", "untied", "biases"],
)
def test_every_weight_arrives_exactly(tmp_path, changes):
    model = llama(**changes)
    path = write_gguf(tmp_path / "model.gguf", model)
    folder = locate(str(path))
    theirs = LlamaForCausalLM.from_pretrained(folder)
    for published, value in model.state_dict().items():
        if published == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        expected = torch.from_numpy(np.array(expected_weight(published, value), np.float32))
        assert torch.equal(theirs.state_dict()[published], expected), published
    tokens_BT = torch.arange(60).view(2, 30)
    expected = theirs(tokens_BT).logits
    assert float(expected.std()) > 0.5
    assert float((load(folder)(tokens_BT) - expected).abs().max()) <= 1e-5
    # And what was rounded is still the model that was written.
    error = (model(tokens_BT).logits - expected).abs().mean() / expected.std()
    assert float(error) < 0.2


@pytest.mark.parametrize(
    ("pre", "digits"), [("gpt-2", ["12"]), ("smollm", ["1", "2"])], ids=["gpt-2", "smollm"]
)
def test_the_tokenizer_arrives(tmp_path, pre, digits):
    path = write_gguf(tmp_path / "model.gguf", llama(), pre=pre)
    folder = locate(str(path))
    tokenizer = resolve(str(folder)).tokenizer
    text = "hello hello<|im_start|>12é"
    tokens = ["hell", "o", "Ġhell", "o", "<|im_start|>", *digits, "Ã", "©"]
    assert tokenizer.encode(text) == [TOKENS.index(token) for token in tokens]
    assert tokenizer.decode(tokenizer.encode(text)) == text.replace("<|im_start|>", "")
    assert tokenizer.eos_ids == (2,)
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.special_tokens == {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    assert AutoTokenizer.from_pretrained(folder)(text)["input_ids"] == tokenizer.encode(text)


def test_a_converted_file_is_converted_once(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", llama())
    folder = locate(str(path))
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    assert verify_folder(folder)
    assert locate(str(path)) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp
    # Another file of that name is another model.
    write_gguf(path, llama(tie_word_embeddings=False))
    assert locate(str(path)) != folder


def test_a_converted_folder_that_has_changed_is_noticed(tmp_path):
    folder = locate(str(write_gguf(tmp_path / "model.gguf", llama())))
    config = folder / "config.json"
    text = config.read_text()
    config.write_text(text + " ")
    with pytest.raises(DataError, match=r"config\.json is damaged"):
        verify_folder(folder)
    config.unlink()
    with pytest.raises(DataError, match=r"config\.json is damaged"):
        verify_folder(folder)
    config.write_text(text)
    assert verify_folder(folder)
    (folder / "SHA256SUMS").unlink()
    with pytest.raises(DataError, match="SHA256SUMS") as caught:
        verify_folder(folder)
    assert str(folder) in caught.value.hint


def test_a_truncated_file_at_any_length(tmp_path, cache):
    whole = write_gguf(tmp_path / "whole.gguf", llama()).read_bytes()
    path = tmp_path / "part.gguf"
    lengths = {*range(0, len(whole) - 1, len(whole) // 40), 3, 17, len(whole) - 1}
    for length in sorted(lengths):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError) as caught:
            locate(str(path))
        assert str(path) in caught.value.message, length
        assert left_overs(cache) == [], length
    path.write_bytes(whole)
    assert len(left_overs(cache)) == 0
    assert locate(str(path)).is_dir()
    assert len(left_overs(cache)) == 1  # so that the searches above could have found something


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UsageError, match=r"none\.gguf: no such file"):
        locate(str(tmp_path / "none.gguf"))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"architecture": "falcon"}, "falcon"),
        ({"pre": "deepseek-llm"}, "deepseek-llm"),
        ({"fields": [("llama.rope.scaling.factor", 2.0)]}, "rope scaling"),
    ],
)
def test_what_is_not_read_is_refused(tmp_path, cache, options, named):
    path = write_gguf(tmp_path / "model.gguf", llama(), **options)
    with pytest.raises(UsageError, match=named) as caught:
        locate(str(path))
    assert str(path) in caught.value.message
    assert left_overs(cache) == []


@pytest.mark.parametrize(
    "missing",
    ["output_norm.weight", "token_embd.weight", "blk.0.attn_q.weight", "blk.1.attn_q.weight"],
)
def test_a_file_without_one_of_its_tensors(tmp_path, cache, missing):
    path = write_gguf(tmp_path / "model.gguf", llama(), without=[missing])
    with pytest.raises(DataError) as caught:
        locate(str(path))
    assert str(path) in caught.value.message
    assert missing in caught.value.message
    assert left_overs(cache) == []


def test_a_tensor_of_another_shape(tmp_path, cache):
    model = llama()
    model.model.layers[1].mlp.down_proj.weight = torch.nn.Parameter(torch.ones(64, 128), False)
    path = write_gguf(tmp_path / "model.gguf", model)
    with pytest.raises(
        DataError, match=r"blk\.1\.ffn_down\.weight has shape \(64, 128\)"
    ) as caught:
        locate(str(path))
    assert str(path) in caught.value.message
    assert left_overs(cache) == []


def test_a_tensor_that_is_not_read(tmp_path, cache):
    extra = {"rope_freqs.weight": np.ones(3, np.float32)}
    path = write_gguf(tmp_path / "model.gguf", llama(), extra=extra)
    with pytest.raises(UsageError, match=r"rope_freqs\.weight") as caught:
        locate(str(path))
    assert str(path) in caught.value.message
    assert left_overs(cache) == []


CONVERT = """
import os, signal, sys
from rich.progress import Progress

# Kills this process at the argv[3]-th tensor, or at the argv[4]-th sync to disk.
num_advances = num_syncs = 0
real_advance, real_fsync = Progress.advance, os.fsync

def advance(*arguments):
    global num_advances
    num_advances += 1
    if num_advances == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    real_advance(*arguments)

def fsync(handle):
    global num_syncs
    num_syncs += 1
    if num_syncs == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    real_fsync(handle)

Progress.advance, os.fsync = advance, fsync
from paceline.models.hub import locate
print(locate(sys.argv[1]))
"""


@pytest.mark.ranks
@pytest.mark.parametrize(("at_tensor", "at_sync"), [(7, 0), (0, 2)], ids=["tensor", "sync"])
def test_a_kill_leaves_nothing_under_the_final_name(tmp_path, cache, at_tensor, at_sync):
    path = write_gguf(tmp_path / "model.gguf", llama())
    command = [sys.executable, "-c", CONVERT, str(path), str(at_tensor), str(at_sync)]
    killed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert list(cache.rglob("converted/.model-*")) != []  # it was on its way
    assert left_overs(cache) == []
    folder = locate(str(path))  # and the next one is not in its way
    assert verify_folder(folder)
    assert json.loads((folder / "config.json").read_text())["hidden_size"] == SIZES["hidden_size"]
