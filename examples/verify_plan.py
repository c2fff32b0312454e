"""Certify plans: their gradients and weights against one process, in float64.

python examples/verify_plan.py
"""

from __future__ import annotations

import torch
from torch import nn

import paceline as pl

PLANS = {
    "two replicas": pl.Plan(mesh=pl.MeshConfig(dp_replicate=2)),
    "state split over two ranks": pl.Plan(mesh=pl.MeshConfig(dp_shard=2)),
}


class Block(nn.Module):
    """Each position sees the sum of what is before it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return x_BTD + torch.tanh(self.linear(x_BTD.cumsum(dim=1)))


class Mixer(nn.Module):
    """A module of your own: tokens in, logits out."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.layers = nn.ModuleList(Block() for _ in range(3))

    def forward(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        x_BTD = self.embedding(tokens_BT)
        for layer in self.layers:
            x_BTD = layer(x_BTD)
        return x_BTD @ self.embedding.weight.T  # tied


def main() -> None:
    for name, plan in PLANS.items():
        for model in ("random:llama:tiny", "random:qwen3-moe:tiny", Mixer()):
            certificate = pl.verify(model, plan)
            what = model if isinstance(model, str) else type(model).__name__
            print(f"{what}, {name}: gradients within {certificate.max_rel_grad_error:.1e}")
            assert certificate.certified, certificate.worst

    unproved = pl.Plan.from_dict({"mesh": {"tp": 2}, "train": {"compile": "on"}})
    try:
        pl.verify("random:llama:tiny", unproved)
    except pl.ConfigError as error:
        print(f"and what nobody has proved is refused: {error}")
    else:
        raise AssertionError("a plan that is not proved has passed")


if __name__ == "__main__":
    main()
