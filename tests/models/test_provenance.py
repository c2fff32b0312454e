"""What is followed through torch's functions covers all that a result depends on, as autograd sees.

Each case is a function of one tensor (2, 3, 8). Its Jacobian says which features every element is
made from: none may be missing in the provenance. Where the ranges are tight, that is stated too.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from paceline.models.trace import trace

pytestmark = pytest.mark.cpu

WIDTH = 8


def heads(x):
    return x.view(2, 3, 2, 4).transpose(1, 2)


def rotated(x):
    half = torch.cat((-x[..., 2:], x[..., :2]), dim=-1)
    angles = torch.arange(1.0, 5.0, dtype=x.dtype)
    return x * angles.cos() + half * angles.sin()


def merged(x):
    return x.transpose(1, 2).reshape(2, 3, -1)


def attended(x):
    q, k, v = rotated(heads(x)), rotated(heads(x)), heads(x)
    return merged(functional.scaled_dot_product_attention(q, k, v, is_causal=True))


def attended_by_hand(x):
    q, k, v = heads(x), heads(x), heads(x)
    scores = (q @ k.transpose(-1, -2) / 2.0).softmax(dim=-1)
    return merged(torch.matmul(scores, v))


def attended_in_batches(x):
    flat = heads(x).reshape(4, 3, 4)
    scores = torch.baddbmm(torch.zeros(4, 3, 3, dtype=x.dtype), flat, flat.transpose(1, 2))
    return merged(torch.bmm(functional.softmax(scores, dim=-1), flat).view(2, 2, 3, 4))


def normed_by_hand(x):
    return merged(heads(x) * heads(x).pow(2).mean(-1, keepdim=True).rsqrt())


def shared_keys(x):
    """Two queries on one key head."""
    queries, keys = x[..., :6], x[..., 6:]
    q = queries.reshape(2, 3, 3, 2).transpose(1, 2)
    k = keys[:, None].expand(2, 3, 3, 2)
    return merged(functional.scaled_dot_product_attention(q, k, k))


def grouped_keys(x):
    q, k = x[..., :4].reshape(2, 3, 2, 2).transpose(1, 2), x[..., 4:6].unsqueeze(1)
    return merged(functional.scaled_dot_product_attention(q, k, k, enable_gqa=True))


def written_in_place(x):
    place = torch.empty(2, 3, 8, dtype=x.dtype)
    place[..., :4].copy_(x[..., 4:])
    place[..., 4:] = x[..., :4]
    return place


def added_in_place(x):
    y = x * 1.0
    first = y[..., :4]
    first += x[..., 4:].sin()
    return y


def of_experts(x):
    flat = x.view(6, 8)
    result = torch.zeros_like(flat)
    result.index_add_(0, torch.tensor([0, 2, 4]), flat[[1, 3, 5]] * 2)
    return result


# Case to its function, and the number of parts that no feature joins; None where it may be less.
CASES = {
    "gated": (lambda x: functional.silu(x[..., :4]) * x[..., 4:], 4),
    "chunked": (lambda x: torch.mul(*x.chunk(2, dim=-1)), 4),
    "interleaved": (lambda x: x[..., ::2].sigmoid() * x[..., 1::2], 4),
    "clamped": (lambda x: torch.max(x, torch.zeros(())).clamp(max=1.0).pow(2), 8),
    "padded": (lambda x: functional.pad(x, (0, 2)), 8),
    "stacked": (lambda x: torch.stack((x[..., :4], x[..., 4:]), -1).flatten(-2), 8),
    "repeated": (lambda x: x.repeat_interleave(2, dim=-1), 8),
    "normed by head": (lambda x: merged(functional.layer_norm(heads(x), (4,))), 2),
    "normed by hand": (normed_by_hand, 2),
    "normed": (lambda x: functional.rms_norm(x, (8,)), 1),
    "summed": (lambda x: heads(x).sum(dim=-1).transpose(1, 2), 2),
    "attention": (attended, 2),
    "attention by hand": (attended_by_hand, 2),
    "attention in batches": (attended_in_batches, 2),
    "shared keys": (shared_keys, None),
    "grouped keys": (grouped_keys, None),
    "cumulated": (lambda x: x.cumsum(dim=1), 8),
    "transposed": (lambda x: x.mT.sin().mT, 8),
    "projected": (lambda x: functional.linear(x, torch.ones(5, 8, dtype=x.dtype)), 1),
    "unknown": (lambda x: torch.fft.fft(x).real, 1),
    "sorted": (lambda x: x.sort(dim=-1).values, 1),
    "einsum": (lambda x: torch.einsum("btd,bsd->bts", x, x), 1),
    "written in place": (written_in_place, None),
    "added in place": (added_in_place, None),
    "experts": (of_experts, None),
}


class Case(nn.Module):
    """A source, the function, and a reader of what it gives."""

    def __init__(self, function, width: int) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 3)
        self.source = nn.Linear(3, WIDTH)
        self.reader = nn.Linear(width, 2)
        self.function = function

    def forward(self, tokens_BT):
        return self.reader(self.function(self.source(self.words(tokens_BT))))


def dependencies(function, x):
    """For each last-dimension feature of the result the features of x that it depends on."""
    jacobian = torch.autograd.functional.jacobian(function, x)
    moved = jacobian.abs().flatten(0, -5).sum(dim=(0, 2, 3))  # (features of y, features of x)
    return [{int(f) for f in row.nonzero()} for row in moved]


def joined_parts(rows: list[set[int]]) -> int:
    """Features of x that are read, in sets that no feature of the result joins."""
    parts: list[set[int]] = []
    for some in filter(None, rows):
        touching = [part for part in parts if part & some]
        parts = [part for part in parts if not part & some] + [some.union(*touching)]
    return len(parts)


@pytest.mark.parametrize("name", CASES)
def test_nothing_that_matters_is_missed(name):
    function, num_parts = CASES[name]
    torch.manual_seed(0)
    x = torch.randn(2, 3, WIDTH, dtype=torch.float64)
    width = function(x).shape[-1]
    module = Case(function, width).double()
    tokens_BT = torch.tensor([[1, 2, 3], [4, 5, 6]])
    graph = trace(module, lambda: module(tokens_BT), tokens_BT).graph
    reader = next(leaf for leaf in graph.leaves if leaf.name == "reader")
    assert {link.source for link in reader.links} == {"source"}
    found: list[set[int]] = [set() for _ in range(width)]
    for link in reader.links:
        for span in link.spans:
            for n, column in enumerate(span.columns):
                found[column] |= {span.rows[n]} if span.is_each else set(span.rows)
    needed = dependencies(function, x)
    assert len(needed) == len(found)
    assert all(need <= have for need, have in zip(needed, found, strict=True)), (needed, found)
    if num_parts is not None:
        assert joined_parts(found) == num_parts


def unseen(x):
    with torch._C.DisableTorchFunction():
        return x * 2


def test_what_comes_by_no_function_of_torch_is_not_split():
    module = Case(unseen, WIDTH).double()
    tokens_BT = torch.tensor([[1, 2, 3], [4, 5, 6]])
    graph = trace(module, lambda: module(tokens_BT), tokens_BT).graph
    reader = next(leaf for leaf in graph.leaves if leaf.name == "reader")
    assert {link.source for link in reader.links} == {""}


def test_parameters_between_layers_are_sources():
    class Scaled(Case):
        def __init__(self) -> None:
            super().__init__(lambda x: x * self.scale, WIDTH)
            self.scale = nn.Parameter(torch.ones(WIDTH))

    module = Scaled().double()
    tokens_BT = torch.tensor([[1, 2, 3], [4, 5, 6]])
    seen = trace(module, lambda: module(tokens_BT), tokens_BT)
    reader = next(leaf for leaf in seen.graph.leaves if leaf.name == "reader")
    assert {link.source for link in reader.links} == {"source", "scale"}
    assert seen.graph.direct == {"scale"}
    assert not seen.has_dropout
