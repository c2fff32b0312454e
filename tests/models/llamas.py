"""Llama models of transformers, tiny and random, as the folders that our readers are given."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from paceline.models.decoder import Decoder
from paceline.models.hub import ModelSource, resolve
from paceline.models.tokenizer import byte_tokenizer, tokenizer_files
from paceline.models.weights import build, fill

SIZES: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 48,
    "intermediate_size": 137,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
SMALL = {"num_hidden_layers": 2, "hidden_size": 24, "intermediate_size": 31}
"""For tests of files, to which sizes do not matter."""


def make_llama(**changes: Any) -> LlamaForCausalLM:
    """A Llama whose every parameter is random, so that a bias or a norm that is left out shows."""
    model = LlamaForCausalLM(LlamaConfig(**SIZES | changes)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            draws = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * draws if "norm" in name else 0.15 * draws)
    return model


def save_folder(model: LlamaForCausalLM, folder: Path, **options: Any) -> Path:
    """A whole model folder: the model as transformers saves it, and the byte tokenizer."""
    model.save_pretrained(folder, **options)
    for name, text in tokenizer_files(byte_tokenizer()).items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def change_config(folder: Path, *removed: str, **changes: Any) -> None:
    """Edits a config.json."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    kept = {key: value for key, value in config.items() if key not in removed}
    path.write_text(json.dumps(kept | changes))


def to_old_style(folder: Path) -> None:
    """Rewrites a config.json as transformers wrote it before version 5."""
    config = json.loads((folder / "config.json").read_text())
    rope = config["rope_parameters"]
    theta = rope.pop("rope_theta")
    scaling = rope if rope["rope_type"] != "default" else None
    change_config(
        folder,
        *("rope_parameters", "dtype"),
        rope_theta=theta,
        rope_scaling=scaling,
        torch_dtype=config["dtype"],
    )


def load(source: ModelSource | Path) -> Decoder:
    """Our model, with its weights."""
    source = resolve(str(source)) if isinstance(source, Path) else source
    model = build(source.spec)
    fill(model, source.weights, torch.device("cpu"))
    return model.eval()
