"""Parameters, gradients and optimizer state split over ranks (ZeRO stage 3), for split passes.

Source: Rajbhandari et al., ZeRO, arXiv:1910.02054, Sec. 5.3 and 7.2.2.
Replaces: fully_sharded.  Needs: mesh.dp_shard > 1.  Forbids: nothing.
Cost: memory a rank: state / dp_shard; besides it, while a pass runs, the whole parameters of the
    unit that it is in and of the first one, and the whole gradients of one bucket. Every
    micro-batch all-gathers P x params bytes before forward passes and as many before backward
    passes, less an untied embedding's, unit by unit, and reduce-scatters P_g x reduce bytes of
    gradients; with dp_replicate > 1 a step all-reduces P_g / dp_shard x reduce bytes of gradients.
    P: parameters, P_g: trained ones, each tensor's rows padded to a multiple of dp_shard. Of words
    that are spread over a pipeline, a micro-batch gathers the embedding once and the head once for
    each barrier, and reduces a tied matrix's gradient twice.
Differs: parameters are gathered in their own dtype, not in that of compute. Where the two differ,
    the copy that `weight.to(dtype)` makes is autograd's, which keeps it from the forward pass to
    the backward one, unless the product casts again by itself, as deferred ones do. Gradients of
    weights that come after the pass (`on_ready`) need no gathered parameter. Nothing is gathered
    ahead of its use.
"""

# ruff: noqa: ARG002 (arguments are the contract's)
from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from torch import Tensor, nn

from paceline.dist.world import World
from paceline.models.decoder import Decoder
from paceline.models.weights import copy_whole
from paceline.optim.parts import Part
from paceline.parallel.data.base import DataParallel
from paceline.parallel.data.optimizer_sharded import gather_rows, trained_parts
from paceline.parallel.data.ready_gradients import ReadyGradients
from paceline.parallel.data.shard_gradients import ShardGradients
from paceline.parallel.data.units import WORDS, Unit, Watch, units_of
from paceline.plan.layout import Place, padded_share
from paceline.plan.plan import PrecisionConfig


class ParameterSharded(DataParallel):
    """ZeRO stage 3, over `dp_shard`; whole replicas of it over `dp_replicate`.

    The model's parameters stay the same objects all the time, so that autograd and hooks know them;
    between passes there is no memory behind them.
    """

    spread_axes = ("dp_shard",)

    def __init__(
        self, world: World, precision: PrecisionConfig, apart: frozenset[str] = frozenset()
    ) -> None:
        super().__init__(world, precision, apart)
        self._rows: dict[nn.Parameter, nn.Parameter] = {}
        self._units: list[Unit] = []
        self._whole: dict[Unit, tuple[nn.Parameter, ...]] = {}

    def wrap(self, model: Decoder) -> None:
        pass

    def put(self, name: str, parameter: nn.Parameter, value: Tensor) -> None:
        if name in self.apart:
            copy_whole(name, parameter, value)
            return
        span = self._span(parameter.shape[0])
        rows = value[span.start : span.stop].to(parameter.device, parameter.dtype, copy=True)
        self._rows[parameter] = nn.Parameter(rows, requires_grad=parameter.requires_grad)
        parameter.untyped_storage().resize_(0)

    def hold(self, model: Decoder, places: Mapping[str, Place]) -> dict[str, Part]:
        parts = {
            name: Part(p, places[name]) if name in self.apart else self._part(p, places[name])
            for name, p in model.named_parameters()
        }
        self._units = units = units_of(model)
        trained = trained_parts(model, parts, self.apart)
        self._gradients = ShardGradients(self.world, self.reduce_dtype, trained)
        self._ready = ReadyGradients(self._gradients, units)
        self._watch = Watch(model, units, self)
        return parts

    def run_stage(self, run: Callable[[], Tensor], is_first: bool) -> Tensor:
        return self._watch.around(run, is_first=is_first)

    def run_words(self, run: Callable[[], None], weight: nn.Parameter) -> None:
        unit = next(unit for unit in self._units if unit.name == WORDS)
        self._gather(unit, (weight,))
        run()
        self._free([unit])

    def before_forward(self, unit: Unit) -> None:
        self._gather(unit, unit.parameters)

    def after_forward(self, unit: Unit) -> None:
        if not self._ready.is_open(unit):  # else a backward pass computes it once more
            self._free([unit])

    def before_backward(self, unit: Unit) -> None:
        self._free(self._ready.begin(unit))
        self._gather(unit, unit.needed_backward)

    def on_ready(self, parameter: Tensor) -> None:
        self._ready.defer(parameter)

    def finish_pass(self, model: Decoder) -> None:
        self._ready.finish_pass()
        self._free(list(self._whole))

    def finish_gradients(self, model: Decoder) -> None:
        self.finish_pass(model)
        self._gradients.finish()

    def finish_update(self, model: Decoder) -> None:
        self._free(list(self._whole))  # a pass that failed may have left some, of old values

    def finish_evaluation(self, model: Decoder) -> None:
        self._free(list(self._whole))

    def _part(self, parameter: nn.Parameter, place: Place) -> Part:
        return Part(self._rows[parameter], place.rows(self._span(place.box.sizes[0])))

    def _span(self, num_rows: int) -> range:
        degree, index = self.world.mesh.dp_shard, self.world.coordinate("dp_shard")
        return padded_share(num_rows, degree, index)

    def _gather(self, unit: Unit, parameters: tuple[nn.Parameter, ...]) -> None:
        shared = tuple(p for p in parameters if p in self._rows)
        self._whole[unit] = shared
        freed = [p for p in shared if not p.untyped_storage().size()]
        for parameter in freed:
            parameter.untyped_storage().resize_(parameter.nbytes)
        gather_rows({parameter: self._rows[parameter] for parameter in freed}, self.world)

    def _free(self, units: Iterable[Unit]) -> None:
        parameters = [p for unit in units for p in self._whole.pop(unit, ())]
        needed = {p for of_unit in self._whole.values() for p in of_unit}
        for parameter in parameters:
            if parameter not in needed:
                # The storage itself stays, and with it what autograd has saved that lies in it.
                parameter.untyped_storage().resize_(0)
