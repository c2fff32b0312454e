"""Virtual tokens before every document: packed is alone, and windows count them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from adapted import VIRTUAL, adapted_model, config_of, difference, plain_model, spec_of, tokens

from paceline.models.layout import PADDING, Layout

pytestmark = pytest.mark.cpu

BOUND = 1e-5
FAMILIES = ["llama", "gemma3", "gpt2", "mistral", "mixtral"]


@pytest.fixture(scope="module", params=FAMILIES)
def spec(request):
    spec = spec_of(request.param)
    return spec if spec.window is None else replace(spec, window=9)


@torch.no_grad()
@pytest.mark.parametrize("method", VIRTUAL)
def test_packed_documents_are_as_if_alone(spec, method):
    model = adapted_model(spec, config_of(method))
    lengths = (9, 1, 23)
    documents_T = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    packed = model(tokens(1, 33), Layout.of_documents(documents_T[None]))
    assert packed.shape == (1, 33, spec.vocab_size)
    for start, length in zip((0, 9, 10), lengths, strict=True):
        part = tokens(1, 33)[:, start : start + length]
        assert difference(packed[:, start : start + length], model(part)) <= BOUND
        assert difference(model(part), plain_model(spec)(part)) > 0.1


@torch.no_grad()
@pytest.mark.parametrize("method", VIRTUAL)
def test_padding_changes_nothing(spec, method):
    model = adapted_model(spec, config_of(method))
    documents_BT = torch.zeros(2, 20, dtype=torch.long)
    documents_BT[1, -6:] = PADDING
    padded = model(tokens(2, 20), Layout.of_documents(documents_BT))
    assert difference(padded[0], model(tokens(2, 20)[:1])[0]) <= BOUND
    assert difference(padded[1, :14], model(tokens(2, 20)[1:, :14])[0]) <= BOUND
    assert padded.isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("method", VIRTUAL)
def test_the_last_logits_alone(spec, method):
    model = adapted_model(spec, config_of(method))
    last = model(tokens(2, 11), last_only=True)
    assert last.shape == (2, 1, spec.vocab_size)
    assert difference(last, model(tokens(2, 11))[:, -1:]) <= BOUND


def brute_mask(layout: Layout, window: int | None) -> torch.Tensor:
    """The rule in words, pair by pair."""
    rows, length = layout.positions_BT.shape
    mask = torch.zeros(rows, length, length, dtype=torch.bool)
    for row in range(rows):
        for query in range(length):
            for key in range(query + 1):
                documents = layout.documents_BT
                is_shared = key < layout.num_shared
                same = documents is None or bool(documents[row, query] == documents[row, key])
                apart = int(layout.positions_BT[row, query] - layout.positions_BT[row, key])
                near = window is None or apart < window
                mask[row, query, key] = (same or is_shared) and near
    return mask


@pytest.mark.parametrize("window", [None, 1, 3, 6, 40])
@pytest.mark.parametrize("num_shared", [0, 4])
def test_masks(window, num_shared):
    documents = torch.tensor([[0] * 5 + [1] * 2 + [2] * 6, [0] * 9 + [PADDING] * 4])
    layout = Layout.of_documents(documents)
    layout = layout.behind(num_shared) if num_shared else layout
    mask = layout.mask_B1TT(window)
    assert mask is not None
    assert torch.equal(mask[:, 0], brute_mask(layout, window))


@pytest.mark.parametrize("window", [None, 3, 40])
def test_masks_of_whole_rows(window):
    layout = Layout.whole_rows(torch.zeros(1, 7)).behind(4)
    assert layout.positions_BT.tolist() == [list(range(11))]
    mask = layout.mask_B1TT(window)
    if window == 3:
        assert mask is not None
        assert torch.equal(mask[:, 0], brute_mask(layout, window))
    else:
        assert mask is None  # the plain causal mask will do
