"""How weights move: optimizers, learning rates, and the one owner of loss and gradient scale."""

from paceline.core.registry import NameTable

OPTIMIZERS = NameTable(
    "optimizer",
    {"adamw": "paceline.optim.adamw:build", "sgd": "paceline.optim.sgd:build"},
)
"""Name to ``build(parameters, config) -> torch.optim.Optimizer`` with its state in place."""
