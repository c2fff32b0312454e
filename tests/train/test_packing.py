"""A packed document has the loss and the gradient that it has alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from paceline.core import rng
from paceline.data.batch import IGNORED, Batch
from paceline.data.rows import DocumentRows, PackedRows, Rows, as_batch
from paceline.data.store import TokenStore
from paceline.models.decoder import Decoder
from paceline.models.families import family
from paceline.models.weights import RandomWeights, build, fill
from paceline.train.objective.next_token import next_token

pytestmark = pytest.mark.cpu

BOUND = 1e-10  # float64
LENGTHS = [5, 1, 12, 40, 1, 1, 8, 2, 31, 1, 9]  # two are longer than gemma3's window of 24
PAD = 3


def model_of(name: str) -> Decoder:
    spec = family(name).PRESETS["tiny"]
    model = build(spec, torch.float64)
    fill(model, RandomWeights(spec), torch.device("cpu"))
    return model


def store_of(vocab_size: int, *, with_answers: bool) -> TokenStore:
    draws = rng.bits(sum(LENGTHS), seed=5, purpose="tokens")
    tokens = (draws % np.uint64(vocab_size)).astype(np.uint32)
    starts = np.arange(1, len(tokens), 3)
    answers = np.stack([starts, starts + 2], axis=1) if with_answers else None
    return TokenStore(tokens, np.cumsum(LENGTHS), answers)


def loss_and_gradients(model: Decoder, batch: Batch) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    loss = next_token(model, batch)
    loss.backward()
    gradients = {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in model.named_parameters()
    }
    return loss.item(), gradients


def alone(store: TokenStore, document: int) -> Batch:
    """A document as a batch of its own, as long as it is."""
    start, end = int(store.starts[document]), int(store.ends[document])
    tokens, has_loss = store.labels(start, end)
    labels = np.append(np.where(has_loss, tokens, IGNORED)[1:], IGNORED)
    places = torch.zeros(1, end - start, dtype=torch.long)
    return Batch(torch.from_numpy(tokens)[None], torch.from_numpy(labels)[None], places)


def only(batch: Batch, row: int, number: int) -> Batch:
    """A batch in which the labels of one document alone count."""
    is_wanted = torch.zeros_like(batch.documents_BT, dtype=torch.bool)
    is_wanted[row] = batch.documents_BT[row] == number
    return replace(batch, labels_BT=batch.labels_BT.where(is_wanted, IGNORED))


def largest_error(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    scale = max(float(g.abs().max()) for g in theirs.values())
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours) / scale


CASES = ["text, end to end", "text, whole", "examples, whole"]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["llama", "gemma3", "mixtral"])
def test_a_packed_document_has_the_loss_and_gradient_that_it_has_alone(name, case):
    model = model_of(name)
    store = store_of(model.spec.vocab_size, with_answers=case.startswith("examples"))
    rows: Rows = (
        PackedRows(store, sum(LENGTHS) - 1)
        if case == "text, end to end"
        else DocumentRows(store, 48, PAD, packed=True)
    )
    batch = as_batch([rows[i] for i in range(len(rows))])
    places = [
        (row, number)
        for row, numbers in enumerate(batch.documents_BT)
        for number in sorted(set(numbers.tolist()) - {-1})
    ]
    # One token alone has nothing to predict: where documents are whole it has no row.
    documents = [
        document
        for document, length in enumerate(LENGTHS)
        if length > 1 or case == "text, end to end"
    ]
    assert len(places) == len(documents)
    total_loss, total = loss_and_gradients(model, batch)
    losses = 0.0
    sums = {name: torch.zeros_like(g) for name, g in total.items()}
    for (row, number), document in zip(places, documents, strict=True):
        expected, expected_gradients = loss_and_gradients(model, alone(store, document))
        found, gradients = loss_and_gradients(model, only(batch, row, number))
        assert found == pytest.approx(expected, rel=BOUND, abs=BOUND)
        if LENGTHS[document] > 1 and expected > 0:
            assert largest_error(gradients, expected_gradients) <= BOUND
        losses += expected
        sums = {name: sums[name] + g for name, g in expected_gradients.items()}
    assert total_loss == pytest.approx(losses, rel=BOUND)
    assert largest_error(total, sums) <= BOUND
    assert case == "text, end to end" or (batch.documents_BT == -1).any()


def test_a_document_that_saw_its_neighbours_would_be_noticed():
    """The comparison can fail: without borders the same batch has other losses."""
    model = model_of("llama")
    store = store_of(model.spec.vocab_size, with_answers=False)
    batch = as_batch([PackedRows(store, sum(LENGTHS) - 1)[0]])
    merged = replace(batch, documents_BT=torch.zeros_like(batch.documents_BT))
    whole, gradients = loss_and_gradients(model, batch)
    other, other_gradients = loss_and_gradients(model, merged)
    assert other != pytest.approx(whole, rel=1e-6)
    assert largest_error(gradients, other_gradients) > 1e-3
