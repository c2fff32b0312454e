"""Gradients and optimizer state split over ranks (ZeRO stage 2): whole gradients live briefly.

Source: Rajbhandari et al., ZeRO, arXiv:1910.02054, Sec. 5.2 and 7.2.1.
Replaces: optimizer_sharded.  Needs: mesh.dp_shard > 1.  Forbids: nothing.
Cost: memory a rank: P whole parameters, gradients and optimizer state / dp_shard, and the whole
    gradients of one bucket. Every micro-batch reduce-scatters P_g x reduce bytes of gradients; a
    step all-gathers P_g x params bytes of parameters, and with dp_replicate > 1 all-reduces
    P_g / dp_shard x reduce bytes of gradients. P_g: trained parameters, each tensor's rows padded
    to a multiple of dp_shard; a tied matrix of words that are spread over a pipeline counts twice
    in every micro-batch.
Differs: as stage 1 in what a part is; buckets end where units end, and those of replicas are
    summed once a step and not in every micro-batch.
"""

# ruff: noqa: ARG002 (arguments are the contract's)
from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from paceline.models.decoder import Decoder
from paceline.models.weights import copy_whole
from paceline.optim.parts import Part
from paceline.parallel.data.base import DataParallel
from paceline.parallel.data.optimizer_sharded import gather_rows, hold_rows, trained_parts
from paceline.parallel.data.ready_gradients import ReadyGradients
from paceline.parallel.data.shard_gradients import ShardGradients
from paceline.parallel.data.units import Unit, Watch, units_of
from paceline.plan.layout import Place


class GradientSharded(DataParallel):
    """ZeRO stage 2, over `dp_shard`; whole replicas of it over `dp_replicate`."""

    spread_axes = ("dp_shard",)

    def wrap(self, model: Decoder) -> None:
        pass

    def put(self, name: str, parameter: nn.Parameter, value: Tensor) -> None:
        copy_whole(name, parameter, value)

    def hold(self, model: Decoder, places: Mapping[str, Place]) -> dict[str, Part]:
        parts, units = hold_rows(model, places, self.world, self.apart), units_of(model)
        self._parts = trained_parts(model, parts, self.apart)
        self._gradients = ShardGradients(self.world, self.reduce_dtype, self._parts)
        self._ready = ReadyGradients(self._gradients, units)
        self._watch = Watch(model, units, self)
        return parts

    def run_stage(self, run: Callable[[], Tensor], is_first: bool) -> Tensor:
        return self._watch.around(run, is_first=is_first)

    def before_forward(self, unit: Unit) -> None:
        pass  # parameters are whole

    def after_forward(self, unit: Unit) -> None:
        pass

    def before_backward(self, unit: Unit) -> None:
        self._ready.begin(unit)

    def on_ready(self, parameter: Tensor) -> None:
        self._ready.defer(parameter)

    def finish_pass(self, model: Decoder) -> None:
        self._ready.finish_pass()

    def finish_gradients(self, model: Decoder) -> None:
        self._ready.finish_pass()
        self._gradients.finish()

    def finish_update(self, model: Decoder) -> None:
        gather_rows(self._parts, self.world)

    def finish_evaluation(self, model: Decoder) -> None:
        pass  # every rank has whole parameters
