"""Deliberate defects in a vocabulary that is spread over a pipeline, each caught by `certify`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from mutation import (
    PADDED,
    Defects,
    Patch,
    assert_caught,
    certify_with,
    clip_by_own_norm,
    nothing,
    plan_of,
)
from torch import Tensor

from paceline.kernels import cross_entropy
from paceline.kernels.cross_entropy import Statistics
from paceline.models.decoder import Decoder
from paceline.models.families.llama import PRESETS
from paceline.parallel.data.ready_gradients import ReadyGradients
from paceline.parallel.pipeline import spread_head
from paceline.parallel.pipeline.base import Action
from paceline.parallel.pipeline.spread_embedding import SpreadEmbedding
from paceline.parallel.pipeline.spread_head import SpreadHead
from paceline.plan.plan import PipelineConfig, Plan, ZeroConfig

pytestmark = [pytest.mark.cpu, pytest.mark.ranks, pytest.mark.slow]

SPEC = replace(
    PRESETS["tiny"],
    vocab_size=43,
    d_model=24,
    num_layers=3,
    num_heads=3,
    num_kv_heads=1,
    head_dim=4,
    d_ffn=20,
    max_positions=32,
)
UNTIED = replace(SPEC, tied_embeddings=False)


def spread(barriers: Any, pp: int = 2, **options: Any) -> Plan:
    pipeline = PipelineConfig(num_microbatches=3, vocabulary="spread", vocabulary_barriers=barriers)
    return plan_of(pp=pp, pipeline=pipeline, length=8, sequences=6, **options)


ONE, TWO = spread(1), spread(2)
SHARDED = spread(1, dp_shard=2, zero=ZeroConfig(stage=2))
DEFECTS = Defects(SPEC)
mutant = DEFECTS.of


@pytest.mark.parametrize("plan", [ONE, TWO, SHARDED], ids=["one", "two", "sharded"])
def test_without_a_defect_it_is_certified(monkeypatch, plan):
    assert certify_with(monkeypatch, plan, SPEC, nothing, PADDED).certified


@mutant(TWO)
def statistics_not_rescaled(patch: Patch, _rank: int) -> None:
    patch.setattr(Statistics, "scale_of", lambda self, _part: 1 / self.total_C)


@mutant(ONE)
def terms_not_rescaled(patch: Patch, _rank: int) -> None:
    patch.setattr(Statistics, "scale_of", lambda self, _part: 1 / self.total_C)


@mutant(TWO)
def totals_added_up_as_if_all_had_one_largest(patch: Patch, _rank: int) -> None:
    def merged(cls: type[Statistics], parts: list[Statistics]) -> Statistics:
        largest = torch.stack([part.largest_C for part in parts]).amax(dim=0)
        total, chosen = (
            sum(part[index] for part in parts)  # type: ignore[misc]
            for index in (1, 2)
        )
        return cls(largest, total, chosen)  # type: ignore[arg-type]

    patch.setattr(Statistics, "merged", classmethod(merged))


@mutant(TWO)
def a_rank_s_term_dropped(patch: Patch, _rank: int) -> None:
    _without_terms_of(0, patch)


@mutant(ONE)
def the_last_rank_s_own_term_dropped(patch: Patch, _rank: int) -> None:
    _without_terms_of(1, patch)


def _without_terms_of(rank: int, patch: Patch) -> None:
    original = SpreadHead.hidden_gradient

    def hidden_gradient(self: SpreadHead, microbatch: int) -> Tensor:
        terms = self._scored[microbatch].terms
        found: Any = spread_head.arrived(terms[rank])
        terms[rank] = torch.zeros_like(found)
        return original(self, microbatch)

    patch.setattr(SpreadHead, "hidden_gradient", hidden_gradient)


@mutant(ONE)
def labels_rows_not_taken_off(patch: Patch, _rank: int) -> None:
    original = SpreadHead._scaled_terms

    def scaled_terms(self: SpreadHead, scored: Any, terms: Mapping[int, Tensor]) -> Tensor:
        num_rows = len(scored.labels_C)
        kept = {rank: term.clone() for rank, term in terms.items()}
        for term in kept.values():
            term[num_rows:] = 0
        return original(self, scored, kept)

    patch.setattr(SpreadHead, "_scaled_terms", scaled_terms)


@mutant(TWO)
def labels_shifted_by_one_at_a_share_s_edge(patch: Patch, _rank: int) -> None:
    original = cross_entropy._columns_of
    patch.setattr(
        cross_entropy,
        "_columns_of",
        lambda labels, own: original(labels, range(own.start + (own.start > 0), own.stop)),
    )


@mutant(ONE, spec=UNTIED)
def words_of_one_share_looked_up_a_row_too_low(patch: Patch, rank: int) -> None:
    original = Decoder.embed

    def embed(self: Decoder, tokens_BT: Tensor, rows: Any = None) -> Tensor:
        return original(self, (tokens_BT - 1).clamp(min=0), rows)

    if rank == 1:
        patch.setattr(Decoder, "embed", embed)


@mutant(TWO)
def weight_gradients_of_one_micro_batch_skipped(patch: Patch, _rank: int) -> None:
    original = SpreadHead._score_backward

    def score_backward(self: SpreadHead, action: Action) -> None:
        add = self._add_to_weight
        if action.microbatch == 1:
            self._add_to_weight = lambda _grad, _scored: None  # type: ignore[method-assign]
        original(self, action)
        self._add_to_weight = add  # type: ignore[method-assign]

    patch.setattr(SpreadHead, "_score_backward", score_backward)


@mutant(ONE)
def embedded_rows_of_one_rank_dropped(patch: Patch, _rank: int) -> None:
    original = SpreadEmbedding.join

    def join(self: SpreadEmbedding, microbatch: int) -> Tensor:
        x_BTD = original(self, microbatch)
        places = self._shares.places(self._tokens_of(microbatch), 1)
        x_BTD.flatten(0, 1)[places] = 0
        return x_BTD

    tokens: dict[int, Tensor] = {}
    look_up = SpreadEmbedding._look_up

    def remember(self: SpreadEmbedding, microbatch: int) -> None:
        look_up(self, microbatch)
        if microbatch in self._tokens:
            tokens[microbatch] = self._tokens[microbatch]

    patch.setattr(SpreadEmbedding, "_look_up", remember)
    patch.setattr(
        SpreadEmbedding, "_tokens_of", lambda _self, microbatch: tokens[microbatch], raising=False
    )
    patch.setattr(SpreadEmbedding, "join", join)


@mutant(ONE)
def gradients_of_embedded_rows_dropped_on_one_rank(patch: Patch, rank: int) -> None:
    original = SpreadEmbedding.deal

    def deal(self: SpreadEmbedding, microbatch: int, grad_BTD: Tensor) -> None:
        original(self, microbatch, grad_BTD)
        rows: Any = self._gradients[microbatch][1]
        self._gradients[microbatch][1] = torch.zeros_like(rows)

    if rank == 0:
        patch.setattr(SpreadEmbedding, "deal", deal)


@mutant(TWO)
def gradients_not_scaled_by_the_step_s_tokens(patch: Patch, _rank: int) -> None:
    patch.setattr(SpreadHead, "_scale_of", lambda _self, loss: torch.ones_like(loss))


@mutant(ONE)
def the_last_norm_left_to_nobody(patch: Patch, _rank: int) -> None:
    def predict(self: Decoder, x_BTD: Tensor, layout: Any, head: Any, tied: Any = None) -> Tensor:
        del layout, tied
        return head(x_BTD + 0 * self.norm(x_BTD), None)

    patch.setattr(Decoder, "predict", predict)


@mutant(ONE)
def each_rank_clips_by_its_own_words(patch: Patch, _rank: int) -> None:
    clip_by_own_norm(patch)


@mutant(SHARDED)
def words_gradients_not_reduced_after_the_first_pass(patch: Patch, _rank: int) -> None:
    original = ReadyGradients.defer
    seen: set[int] = set()

    def defer(self: ReadyGradients, parameter: Tensor) -> None:
        if parameter.shape[0] in (21, 22):  # rows of words
            if id(parameter) in seen:
                parameter.grad = None
                return
            seen.add(id(parameter))
        original(self, parameter)

    patch.setattr(ReadyGradients, "defer", defer)


@pytest.mark.parametrize("name", DEFECTS)
def test_the_certificate_fails(monkeypatch, name):
    assert_caught(monkeypatch, DEFECTS[name])
