"""Parameters, gradients and optimizer state split over ranks (ZeRO stage 3).

Source: Rajbhandari et al., ZeRO, arXiv:1910.02054, Sec. 5.3; Zhao et al., PyTorch FSDP,
    arXiv:2304.11277. torch's ``fully_shard`` does the work, one unit a block.
Replaces: replicated.  Needs: mesh.dp_shard > 1.  Forbids: split backward passes.
Cost: memory a rank: state / dp_shard; besides it, while a pass runs, the whole parameters of two
    blocks and of what is outside them. Every micro-batch all-gathers P x compute bytes of
    parameters before forward passes and those of blocks again before backward passes, and
    reduce-scatters P_g x reduce bytes of gradients; with dp_replicate > 1 it all-reduces
    P_g / dp_shard x reduce bytes too. P: parameters, P_g: trained ones, each tensor's rows padded
    to a multiple of dp_shard.
Differs: gradients are summed, not averaged.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from paceline.dist.collectives import CountedAllGather, CountedReduceScatter
from paceline.kernels.device import choose_dtype
from paceline.models.decoder import Decoder
from paceline.models.weights import copy_whole
from paceline.optim.parts import Part
from paceline.parallel.data.base import DataParallel
from paceline.plan.layout import Place, padded_share


class FullySharded(DataParallel):
    """ZeRO stage 3, over `dp_shard`; whole replicas of it over `dp_replicate`."""

    spread_axes = ("dp_shard",)

    def wrap(self, model: Decoder) -> None:
        is_hybrid = self.world.mesh.dp_replicate > 1
        axes = ("dp_replicate", "dp_shard") if is_hybrid else ("dp_shard",)
        policy = MixedPrecisionPolicy(
            param_dtype=choose_dtype(self.precision.compute, self.world.device),
            reduce_dtype=self.reduce_dtype,
            cast_forward_inputs=False,
        )
        mesh = self.world.device_mesh(*axes)
        ignored = {model.get_parameter(name) for name in self.apart}
        for unit in (*model.blocks, model):
            fully_shard(unit, mesh=mesh, mp_policy=policy, ignored_params=ignored or None)
            wrapped = cast("FSDPModule", unit)
            wrapped.set_gradient_divide_factor(1.0)
            wrapped.set_force_sum_reduction_for_comms(True)
            self._count(wrapped)

    def _count(self, unit: FSDPModule) -> None:
        """Has a unit's collectives written down with those of the world."""
        traffic, axes = self.world.traffic, ("dp_shard",)
        gather = CountedAllGather(traffic, axes, "parameters")
        reduce = CountedReduceScatter(traffic, axes, "gradients")
        unit.set_custom_all_gather(cast("Any", gather))
        unit.set_custom_reduce_scatter(cast("Any", reduce))
        if self.world.mesh.dp_replicate > 1:
            unit.set_all_reduce_hook(
                lambda total: traffic.add(
                    "all-reduce", ("dp_replicate",), total.nbytes, "gradients"
                )
            )

    def put(self, name: str, parameter: nn.Parameter, value: Tensor) -> None:
        if name in self.apart:
            copy_whole(name, parameter, value)
            return
        assert isinstance(parameter, DTensor)
        # Every rank has read the whole value: no one needs to send it.
        whole = value.to(parameter.device, parameter.dtype)
        part = distribute_tensor(
            whole, parameter.device_mesh, parameter.placements, src_data_rank=None
        )
        parameter.copy_(part)

    def hold(self, model: Decoder, places: Mapping[str, Place]) -> dict[str, Part]:
        degree, index = self.world.mesh.dp_shard, self.world.coordinate("dp_shard")

        def part(name: str, place: Place) -> Place:
            if name in self.apart:
                return place
            return place.rows(padded_share(place.box.sizes[0], degree, index))

        return {n: Part(p, part(n, places[n])) for n, p in model.named_parameters()}

    def finish_pass(self, model: Decoder) -> None:
        pass  # gradients are reduced as they become ready

    def finish_gradients(self, model: Decoder) -> None:
        pass  # reduced during each backward pass

    def finish_update(self, model: Decoder) -> None:
        pass  # parts are gathered when they are needed

    def finish_evaluation(self, model: Decoder) -> None:
        # The outermost unit keeps what it has gathered until its backward pass.
        cast("FSDPModule", model).reshard()
