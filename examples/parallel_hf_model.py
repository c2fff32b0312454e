"""A Hugging Face model of your own, parallel, in your own loop.

torchrun --nproc-per-node 2 examples/parallel_hf_model.py
"""

from __future__ import annotations

import os

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import paceline as pl

NUM_RANKS, RANK = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}


def main() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=4, num_key_value_heads=2))
    whole = sum(parameter.numel() for parameter in model.parameters())

    plan = pl.Plan(mesh=pl.MeshConfig(dp_shard=NUM_RANKS))
    model = pl.parallelize(model, plan)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        # Lines that count from anywhere; those of some ranks are longer.
        tokens_BT = (torch.arange(9 + 7 * RANK) + torch.randint(64, (8, 1))) % 64
        loss = pl.global_mean(loss_sum(model, tokens_BT), tokens_BT[:, 1:].numel())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

    mine = sum(parameter.to_local().numel() for parameter in model.parameters())
    print(f"rank {RANK} holds {mine:,} of {whole:,} parameters")
    print(f"loss over all ranks' tokens: {losses[0]:.2f} -> {losses[-1]:.2f}")
    assert mine <= 1.02 * whole / NUM_RANKS, "each rank holds its share"
    assert losses[-1] < 0.5 * losses[0], "and the model learns to count"


def loss_sum(model: nn.Module, tokens_BT: torch.Tensor) -> torch.Tensor:
    logits_BTV = model(input_ids=tokens_BT).logits[:, :-1]
    labels_R = tokens_BT[:, 1:].flatten()
    return nn.functional.cross_entropy(logits_BTV.flatten(0, 1), labels_R, reduction="sum")


if __name__ == "__main__":
    main()
