"""A rank's part of a model for inference: a stage of its blocks, cut over tensor ranks.

Source: Du et al., EnergonAI, arXiv:2209.02341 (tensor parallelism within a stage, a pipeline of
    stages); Shoeybi et al., Megatron-LM, arXiv:1909.08053, Sec. 3 (the cut).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from paceline.dist.world import World
from paceline.models.attention import Attention, AttentionSite
from paceline.models.decoder import Decoder
from paceline.models.fuse import fuse
from paceline.models.weights import Weights, build, fill
from paceline.parallel.part_weights import PartWeights
from paceline.parallel.pipeline.partition import stage_layers
from paceline.parallel.pipeline.stages import Cut, StageModel, keep_stages, stage_models
from paceline.parallel.tensor.decoder import split
from paceline.plan.layout import Place
from paceline.plan.model_spec import ModelSpec
from paceline.plan.tensor_rules import HeadShare, head_share

_SHORT = 1
"""Tokens of a sequence where stages are made even: a step costs its weights, not its context."""


@dataclass(frozen=True, slots=True)
class ModelPart:
    """What a rank computes of a model.

    Attributes:
        decoder: of which this rank's stage is there, its matrices cut.
        stage: called as the whole model is.
        is_first: whether it takes tokens; else what the stage before has sent.
        is_last: whether it gives logits; else hidden states.
        store_spec: sizes of a store for the keys and values of this rank's heads and layers.
    """

    decoder: Decoder
    stage: Decoder | StageModel
    is_first: bool
    is_last: bool
    store_spec: ModelSpec


def load_part(spec: ModelSpec, weights: Weights, world: World, dtype: torch.dtype) -> ModelPart:
    """Builds this rank's part of a model, with its weights and no others.

    Args:
        spec: sizes of the model.
        weights: of the whole model.
        world: the ranks, along ``pp`` and ``tp``.
        dtype: of weights and activations.
    """
    decoder = build(spec, dtype).eval()
    cut = _cut(spec, world)
    keep_stages(decoder, cut)
    if world.degree("tp") > 1:
        places = split(decoder, spec, world, is_sequence_parallel=False).places
    else:
        named = decoder.named_parameters()
        places = {name: Place.of_whole(tuple(p.shape)) for name, p in named}
    fill(decoder, PartWeights(weights, places), world.device)
    fuse(decoder)
    (stage,) = stage_models(decoder, cut).values()
    layers = cut.layers[world.coordinate("pp")]
    store_spec = _number_sites(decoder, layers, spec, world)
    return ModelPart(decoder, stage, cut.has_first, cut.has_last, store_spec)


def _cut(spec: ModelSpec, world: World) -> Cut:
    degree, rank = world.degree("pp"), world.coordinate("pp")
    layers = stage_layers(spec, degree, _SHORT)
    return Cut(layers, (rank,), {stage: stage for stage in range(degree)}, spec.tied_embeddings)


def _number_sites(decoder: Decoder, layers: range, spec: ModelSpec, world: World) -> ModelSpec:
    """Numbers the attentions that are here, so that a store has room for no others.

    Returns:
        The model's sizes with as many layers and key heads as such a store has.
    """
    heads = head_share(
        spec.num_heads, spec.num_kv_heads, world.degree("tp"), world.coordinate("tp")
    )
    num_keys, is_grouped = len(heads.key), heads.is_grouped
    for index, layer in enumerate(layers):
        attention = decoder.blocks[layer].attention
        assert isinstance(attention, Attention), f"block {layer} has no attention"
        if is_grouped:
            attention.site = replace(attention.site, layer=index)
        else:
            attention.key_of_query = None
            sites = [index * num_keys + key for key in range(num_keys)]
            attention.around_core = _by_key_head(heads, attention.site, sites)
    if is_grouped:
        return replace(spec, num_layers=len(layers), num_kv_heads=num_keys)
    return replace(spec, num_layers=len(layers) * num_keys, num_kv_heads=1)


def _by_key_head(
    heads: HeadShare, site: AttentionSite, numbers: list[int]
) -> Callable[..., Tensor]:
    """Attention of groups of unequal size, each key head's for itself.

    A key head is then kept once, and not once for each query head that reads it.
    """
    readers = [
        [query for query, key in enumerate(heads.key_of_query) if key == number]
        for number in range(len(heads.key))
    ]
    sites = [replace(site, layer=number) for number in numbers]

    def around(core: partial[Tensor], q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor) -> Tensor:
        parts: list[Any] = []
        for key, (queries, place) in enumerate(zip(readers, sites, strict=True)):
            q_BTGH = q_BTNH[:, :, queries[0] : queries[-1] + 1]
            k_BT1H, v_BT1H = k_BTKH[:, :, key : key + 1], v_BTKH[:, :, key : key + 1]
            parts.append(core(q_BTGH, k_BT1H, v_BT1H, site=place))
        return torch.cat(parts, dim=2)

    return around
