"""Whole replicas: every rank holds everything, gradients are summed once a step.

Source: Li et al., PyTorch Distributed, arXiv:2006.15704, Sec. 3.2 (gradients in buckets).
Replaces: nothing, it is the default (ZeRO stage 0).  Needs: nothing.  Forbids: nothing.
Cost: an all-reduce of the gradients, P x reduce bytes, a step for P trained parameters; no memory
    saved.
Differs: buckets are reduced after the last backward pass, without overlap.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from paceline.models.decoder import Decoder
from paceline.models.weights import copy_whole
from paceline.optim.parts import Part
from paceline.parallel.buckets import sum_in_buckets
from paceline.parallel.data.base import DataParallel
from paceline.plan.layout import Place
from paceline.plan.mesh import DATA_AXES


class Replicated(DataParallel):
    """ZeRO stage 0."""

    def wrap(self, model: Decoder) -> None:
        pass

    def put(self, name: str, parameter: nn.Parameter, value: Tensor) -> None:
        copy_whole(name, parameter, value)

    def hold(self, model: Decoder, places: Mapping[str, Place]) -> dict[str, Part]:
        return {name: Part(p, places[name]) for name, p in model.named_parameters()}

    def finish_pass(self, model: Decoder) -> None:
        pass  # gradients are summed once a step

    @torch.no_grad()
    def finish_gradients(self, model: Decoder) -> None:
        if self.world.mesh.num_data_ranks == 1:
            return
        gradients: list[Tensor] = []
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad or name in self.apart:
                continue
            if parameter.grad is None:  # every rank must bring the same buckets
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        dtype = self.reduce_dtype
        sum_in_buckets(gradients, self.world, DATA_AXES, purpose="gradients", dtype=dtype)

    def finish_update(self, model: Decoder) -> None:
        pass  # every rank has moved everything

    def finish_evaluation(self, model: Decoder) -> None:
        pass  # nothing was gathered
