"""A real model, SmolLM2-135M-Instruct, with adapters that `peft` has written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from engines import GREEDY
from transformers import LlamaForCausalLM

from paceline.models.adapters import resolve_adapted
from paceline.models.hub import fetch
from paceline.plan.plan import Plan
from paceline.serve.load import load_engine
from paceline.serve.request import Request

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:peft"),
]

NUM_TOKENS = 24
CONFIGS = {
    "lora": lambda: peft.LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear"),
    "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=9),
    "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=9),
}


@torch.inference_mode()
def greedy(model: Any, ids: list[int]) -> list[int]:
    """The most likely tokens, without a cache; the last logits are the last token's."""
    for _ in range(NUM_TOKENS):
        ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
    return ids[-NUM_TOKENS:]


@pytest.mark.parametrize("method", CONFIGS)
def test_greedy_tokens_are_those_of_peft(method, tmp_path):
    folder: Path = fetch("smollm2-135m")
    base = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    torch.manual_seed(1)
    model = peft.get_peft_model(base, CONFIGS[method]()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    plan = Plan().with_overrides(['serve.dtype="float32"'])
    # The file names the folder that the model came from; no other word is needed.
    engine = load_engine(resolve_adapted(str(tmp_path)), plan, device="cpu")
    ids = engine.tokenizer.encode("Once upon a time, in a village by the sea,")
    request = Request(
        prompt_ids=tuple(ids), sampling=GREEDY, max_tokens=NUM_TOKENS, ignore_eos=True
    )
    (answer,) = engine.generate([request])
    assert list(answer.token_ids) == greedy(model, ids)
    plain = load_engine(str(folder), plan, device="cpu").generate([request])[0]
    assert answer.token_ids != plain.token_ids
