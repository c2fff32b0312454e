"""A real model, SmolLM2-135M-Instruct, with adapters that `peft` has written, in one batch."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from engines import GREEDY
from tenants import answers_alone, answers_together, engine_of
from transformers import LlamaForCausalLM

from paceline.models.hub import fetch, resolve
from paceline.serve.request import Request

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:peft"),
]

NUM_TOKENS = 24
PROMPTS = ["Once upon a time, in a village by the sea,", "The three largest cities of Europe are"]
CONFIGS = {
    "wide": {"r": 8, "target_modules": "all-linear"},
    "of-attention": {"r": 16, "lora_alpha": 64, "target_modules": ["q_proj", "v_proj"]},
    "of-rslora": {"r": 4, "use_rslora": True, "target_modules": ["o_proj", "down_proj"]},
    "of-dora": {"r": 2, "use_dora": True, "target_modules": ["k_proj", "up_proj"]},
}


def write(folder: Path, base: Path, seed: int, options: dict[str, object]) -> Path:
    """An adapter as `peft` writes it, far enough from its start to change the text."""
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(seed)
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def test_all_together_is_each_alone(tmp_path):
    base = fetch("smollm2-135m")
    source = resolve(str(base))
    folders = {
        name: write(tmp_path / name, base, seed, options)
        for seed, (name, options) in enumerate(CONFIGS.items())
    }
    requests = [
        Request(
            prompt_ids=tuple(source.tokenizer.encode(prompt)),
            sampling=GREEDY,
            max_tokens=NUM_TOKENS,
            ignore_eos=True,
        )
        for prompt in PROMPTS
    ]
    alone = answers_alone(source, folders, requests)
    assert len({tuple(answers) for answers in alone.values()}) == len(alone)
    engine = engine_of(source, folders)
    assert answers_together(engine, requests) == alone
    assert answers_together(engine, requests) == alone  # prompts are found in the cache now
