"""A Hugging Face model of your own whose matrices two ranks share, in your own loop.

torchrun --nproc-per-node 2 examples/split_hf_model.py
"""

from __future__ import annotations

import os
import tempfile

import torch
from torch import nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

import paceline as pl

NUM_RANKS, RANK = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}


def main() -> None:
    torch.manual_seed(0)  # tensor ranks read the same data
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, num_hidden_layers=4))
    whole = sum(parameter.numel() for parameter in model.parameters())

    plan = pl.Plan(mesh={"tp": NUM_RANKS}, tensor={"sequence_parallel": False})
    model = pl.parallelize(model, plan)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        tokens_BT = (torch.arange(12) + torch.randint(64, (8, 1))) % 64
        loss = next_token_loss(model, tokens_BT)
        loss.backward()
        pl.clip_gradients(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

    mine = sum(parameter.numel() for parameter in model.parameters())
    print(f"rank {RANK} holds {mine:,} of {whole:,} parameters")
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")
    assert mine < 1.05 * whole / NUM_RANKS, "each rank holds its share; norms are whole"
    assert losses[-1] < 0.5 * losses[0], "and the model learns to count"
    save(model, losses[-1])


def next_token_loss(model: nn.Module, tokens_BT: torch.Tensor) -> torch.Tensor:
    logits_BTV = model(input_ids=tokens_BT).logits[:, :-1]
    return nn.functional.cross_entropy(logits_BTV.flatten(0, 1), tokens_BT[:, 1:].flatten())


def save(model: nn.Module, last_loss: float) -> None:
    state = pl.whole_state(model)  # every rank takes part
    if RANK == 0:
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder, state_dict=state)
            alone = GPTNeoXForCausalLM.from_pretrained(folder)
        counting_BT = (torch.arange(12) + torch.arange(8)[:, None]) % 64
        loss = next_token_loss(alone, counting_BT).item()
        print(f"saved as one model, and read by one process: loss {loss:.2f}")
        assert loss < 2 * last_loss


if __name__ == "__main__":
    main()
