"""A decoder cut into stages: what each holds, and how it is called."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

from paceline.kernels.deferred import DeferredGradients
from paceline.models.decoder import Absent, Decoder
from paceline.models.layout import Layout
from paceline.models.linear import Linear
from paceline.models.tied import TiedEmbedding
from paceline.models.vocabulary import Head, Output, logits
from paceline.parallel.pipeline import SCHEDULES
from paceline.parallel.pipeline.base import Schedule
from paceline.parallel.pipeline.partition import stage_layers
from paceline.parallel.pipeline.runtime import Border
from paceline.plan.model_spec import ModelSpec
from paceline.plan.plan import Plan


@dataclass(frozen=True, slots=True)
class Cut:
    """Which layers each stage has, and which stages are here.

    Attributes:
        layers: of every stage of the model.
        own: the stages of this rank.
        ranks: the rank on the pipeline's axis of every stage.
        is_tied: whether one matrix is embedding and head.
        is_spread: whether the words of these are spread over ranks, in no stage.
    """

    layers: tuple[range, ...]
    own: tuple[int, ...]
    ranks: Mapping[int, int]
    is_tied: bool
    is_spread: bool = False

    @property
    def last(self) -> int:
        """The stage with the head."""
        return len(self.layers) - 1

    @property
    def has_first(self) -> bool:
        """Whether the stage with the embedding is here."""
        return 0 in self.own

    @property
    def has_last(self) -> bool:
        """Whether the stage with the head is here."""
        return self.last in self.own

    @property
    def other_end(self) -> int | None:
        """The rank that has the same matrix at the model's other end; None where none has."""
        first, last = self.ranks[0], self.ranks[self.last]
        if (
            self.is_spread
            or not self.is_tied
            or first == last
            or not (self.has_first or self.has_last)
        ):
            return None
        return last if self.has_first else first


def keep_stages(model: Decoder, cut: Cut) -> None:
    """Leaves a decoder of the meta device the stages of this rank, in place.

    Parameters keep their names. The matrix of a model that has one for embedding and head is with
    both of them; both are on every rank where their words are spread.
    """
    here = {layer for stage in cut.own for layer in cut.layers[stage]}
    for layer in range(len(model.blocks)):
        if layer not in here:
            model.blocks[layer] = Absent()
    if not cut.has_first:
        if cut.other_end is None and not cut.is_spread:
            model.embedding = cast("nn.Embedding", Absent())
        if model.spec.positions == "learned":
            model.position_embedding = cast("nn.Embedding", Absent())
    if not cut.has_last:
        model.norm = Absent()
        if not (cut.is_tied or cut.is_spread):
            model.head = cast("Linear", Absent())


class StageModel:
    """One stage, called as the whole model is.

    Args:
        model: this rank's part of the decoder.
        layers: of the stage.
        is_first: whether it takes tokens; else it takes what `given` is.
        is_last: whether it calls the head; else it gives hidden states.

    Where the vocabulary is apart, the first stage takes embedded tokens, and the last gives hidden
    states after the last norm.

    Attributes:
        given: what the stage before, or the embedding, has made of the batch.
    """

    def __init__(self, model: Decoder, layers: range, *, is_first: bool, is_last: bool) -> None:
        self._model = model
        self._layers = layers
        self._is_first, self._is_last = is_first, is_last
        self.given: Tensor | None = None

    def __call__(
        self, tokens_BT: Tensor, layout: Layout | None = None, *, head: Head = logits
    ) -> Tensor:
        model, place = self._model, layout or Layout.whole_rows(tokens_BT)
        is_apart = model.vocabulary.is_apart
        is_whole = self._is_first and self._is_last and not is_apart
        tied = TiedEmbedding(model.embedding.weight) if is_whole and self._is_tied else None
        if self._is_first and not is_apart:
            x_BTD = model.embed(tokens_BT, tied)
        else:
            assert self.given is not None, "a stage runs after what is before it"
            x_BTD, self.given = self.given, None
        if self._is_first:
            x_BTD = model.positioned(x_BTD, place)
        x_BTD = model.through(x_BTD, place, self._layers)
        if not self._is_last:
            return x_BTD
        return model.predict(x_BTD, place, _as_they_are if is_apart else head, tied)

    @property
    def _is_tied(self) -> bool:
        return self._model.spec.tied_embeddings


def _as_they_are(x_BTD: Tensor, output: Output) -> Tensor:
    """The head that leaves hidden states to others."""
    del output
    return x_BTD


def stage_models(model: Decoder, cut: Cut) -> dict[int, Decoder | StageModel]:
    """What objectives call for each stage of this rank: the model itself where it is whole."""
    if cut.last == 0:
        return {0: model}
    return {
        stage: StageModel(model, cut.layers[stage], is_first=stage == 0, is_last=stage == cut.last)
        for stage in cut.own
    }


def cut_of(plan: Plan, spec: ModelSpec, rank: int) -> Cut:
    """The stages of a model, and those of a rank on the pipeline's axis."""
    degree, per_rank = plan.mesh.pp, plan.pipeline.stages_per_rank
    schedule: Schedule = SCHEDULES.load(plan.pipeline.schedule)
    own = [schedule.stages_of(other, degree, per_rank) for other in range(degree)]
    is_spread = plan.pipeline.vocabulary == "spread"
    layers = stage_layers(
        spec,
        degree * per_rank,
        plan.train.sequence_length,
        plan.pipeline.stage_cuts,
        has_head=not is_spread,
    )
    ranks = {stage: other for other, stages in enumerate(own) for stage in stages}
    return Cut(layers, own[rank], ranks, spec.tied_embeddings, is_spread)


def defer(model: Decoder, plan: Plan) -> DeferredGradients:
    """What linear layers owe where backward passes are split.

    In a pipeline several micro-batches are under way, and none of them may keep a cast weight.
    """
    deferred = DeferredGradients()
    schedule: Schedule = SCHEDULES.load(plan.pipeline.schedule)
    if plan.mesh.pp > 1 or schedule.splits_backward:
        for module in model.modules():
            if isinstance(module, Linear):
                module.product = deferred.linear
    return deferred


def border_of(model: Decoder, plan: Plan, tokens: tuple[int, ...]) -> Border:
    """What goes from stage to stage: hidden states, or this rank's rows of them."""
    assert model.compute_dtype is not None
    width = model.spec.d_model
    if plan.mesh.tp > 1 and plan.tensor.sequence_parallel:
        return Border((1, -(-math.prod(tokens) // plan.mesh.tp), width), model.compute_dtype)
    return Border((*tokens, width), model.compute_dtype)
