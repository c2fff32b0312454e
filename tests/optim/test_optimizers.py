"""The optimizers of the table: their groups, and state that is there before the first step."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from paceline.core.errors import UnknownNameError
from paceline.optim import OPTIMIZERS
from paceline.optim.groups import parameter_groups
from paceline.plan.plan import OptimizerConfig

pytestmark = pytest.mark.cpu


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.full((2, 3), 1.5))
        self.vector = nn.Parameter(torch.full((3,), 2.5))
        self.frozen = nn.Parameter(torch.full((2, 2), 3.5), requires_grad=False)


def test_matrices_decay_and_vectors_do_not():
    toy = Toy()
    matrices, vectors = parameter_groups(toy.parameters(), OptimizerConfig(weight_decay=0.25))
    assert [id(p) for p in matrices["params"]] == [id(toy.matrix)]
    assert [id(p) for p in vectors["params"]] == [id(toy.vector)]
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.25, 0.0)


def test_a_group_without_parameters_is_left_out():
    toy = Toy()
    toy.matrix.requires_grad_(False)
    (group,) = parameter_groups(toy.parameters(), OptimizerConfig())
    assert [id(p) for p in group["params"]] == [id(toy.vector)]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_is_in_place_and_zero_before_the_first_step(name):
    toy = Toy()
    optimizer = OPTIMIZERS.load(name)(toy.parameters(), OptimizerConfig(name=name))
    assert set(optimizer.state) == {toy.matrix, toy.vector}
    for parameter, state in optimizer.state.items():
        moments = [value for value in state.values() if value.ndim]
        assert moments
        assert all(m.shape == parameter.shape and m.dtype == parameter.dtype for m in moments)
        assert not any(value.any() for value in state.values())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_in_place_changes_no_step(name):
    """The same steps as torch's own optimizer, which makes its state at the first of them."""
    config = OptimizerConfig(name=name, lr=0.1, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.5)
    ours, theirs = Toy(), Toy()
    optimizer = OPTIMIZERS.load(name)(ours.parameters(), config)
    groups = [
        {"params": [theirs.matrix], "weight_decay": 0.5},
        {"params": [theirs.vector], "weight_decay": 0.0},
    ]
    reference = {
        "adamw": lambda: torch.optim.AdamW(groups, lr=0.1, betas=(0.8, 0.9), eps=1e-3),
        "sgd": lambda: torch.optim.SGD(groups, lr=0.1, momentum=0.8),
    }[name]()
    for step in range(1, 5):
        for toy in (ours, theirs):
            for parameter in (toy.matrix, toy.vector):
                parameter.grad = torch.linspace(-1, step, parameter.numel()).view_as(parameter)
        optimizer.step()
        reference.step()
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-7)
    assert not torch.equal(ours.matrix, torch.full((2, 3), 1.5))
    assert torch.equal(ours.frozen, torch.full((2, 2), 3.5))


def test_an_unknown_optimizer_names_near_ones():
    with pytest.raises(UnknownNameError) as caught:
        OPTIMIZERS.load("adam")
    assert "adamw" in caught.value.hint
