"""The forward and backward passes of a step's micro-batches on one rank, in a schedule's order.

Without a pipeline there is one stage, the model, and the same runtime runs it.

Traffic of a step with m micro-batches, E being the bytes of a `Border`, u the borders between a
stage of this rank and a later one on another rank, d those between one and an earlier one: a rank
sends m u E of activations and m d E of their gradients, and receives m d E and m u E. Two ranks
that have one matrix as embedding and as head send each other its gradient, or their part of it.
Where the vocabulary is spread: `paceline.parallel.pipeline.spread_vocabulary`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from paceline.core.clock import Clock, WallClock
from paceline.data.batch import Batch
from paceline.dist.p2p import PointToPoint
from paceline.dist.world import World
from paceline.kernels.deferred import DeferredGradients
from paceline.optim.parts import Part
from paceline.parallel.pipeline.base import (
    Action,
    Kind,
    RankActions,
    Schedule,
    forward_only,
    line_of,
)
from paceline.parallel.pipeline.communicate import add_transfers
from paceline.parallel.pipeline.runtime import EDGE_ENDS, PURPOSES, Border, Ends, Runtime
from paceline.parallel.pipeline.spread_embedding import SpreadEmbedding
from paceline.parallel.pipeline.spread_head import SpreadHead
from paceline.parallel.pipeline.spread_vocabulary import SpreadEnds
from paceline.parallel.pipeline.stages import Cut, StageModel
from paceline.parallel.pipeline.timeline import Span
from paceline.parallel.pipeline.vocabulary_passes import spread_vocabulary
from paceline.parallel.pipeline.words import PURPOSES as WORD_PURPOSES
from paceline.parallel.pipeline.words import Spread, Words

TIED = "tied gradients"
EMBEDDING = "embedding.weight"

Objective = Callable[[Any, Batch], Tensor]
"""``objective(model, batch)``: see `paceline.train.objective.base`."""


class Passes:
    """Runs micro-batches through the stages of this rank.

    Args:
        cut: which stages are here.
        models: what an objective calls for each of them; `StageModel` where there are several.
        schedule: in which order.
        stages_per_rank: of the pipeline.
        border: shape and dtype of what goes from stage to stage, for a shape of tokens.
        world: the ranks.
        deferred: what the linear layers owe.
        spread: how the vocabulary is spread; None where edge stages have it.
        run_stage: calls a function that runs the forward pass of one of several stages; also given
            whether the stage looks tokens up.
        on_ready: is told of each parameter whose gradient a weight pass has completed.
        finished: is called after each backward and weight pass.
        share: gives the places of a batch that this rank has.
        clock: of the trace.

    Attributes:
        trace: what the last run did, in seconds on the clock.
    """

    def __init__(
        self,
        cut: Cut,
        models: Mapping[int, Any],
        *,
        schedule: Schedule,
        stages_per_rank: int,
        border: Callable[[tuple[int, ...]], Border],
        world: World,
        deferred: DeferredGradients,
        spread: Spread | None = None,
        run_stage: Callable[[Callable[[], Tensor], bool], Tensor],
        on_ready: Callable[[Tensor], None],
        finished: Callable[[], None],
        share: Callable[[Batch], Batch] = lambda batch: batch,
        clock: Clock | None = None,
    ) -> None:
        self._cut, self._models = cut, models
        self._schedule, self._stages_per_rank = schedule, stages_per_rank
        self._border_of = border
        self._world = world
        self._deferred = deferred
        self._run_stage = run_stage
        self._on_ready, self._finished = on_ready, finished
        self._share = share
        self._clock = clock or WallClock()
        self._peers = PointToPoint(world, "pp", (*PURPOSES, TIED))
        self._spread = spread
        if spread:
            purposes = tuple(WORD_PURPOSES.values())
            self._word_peers = PointToPoint(
                world, "pp", purposes, distances=range(1, world.degree("pp"))
            )
        self._batches: Sequence[Batch] = ()
        self._runtimes: dict[tuple[int, bool], Runtime] = {}
        self.trace: list[Span] = []

    def train(
        self, batches: Sequence[Batch], objective: Objective, scaled: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Adds the micro-batches' gradients to those of the parameters.

        Args:
            batches: of this rank's step.
            objective: gives the sum of a micro-batch's losses.
            scaled: what backward runs on, of such a sum.

        Returns:
            The sum of all losses that were seen here, float64; 0 where the last stage is not.
        """
        return self._run(batches, objective, scaled, is_evaluation=False)

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch], objective: Objective) -> Tensor:
        """The sum of the micro-batches' losses, as `train` gives it, without gradients."""
        return self._run(batches, objective, lambda loss: loss, is_evaluation=True)

    def finish_gradients(self, parts: Mapping[str, Part]) -> None:
        """Sums the gradients of the matrix that is embedding on one rank and head on another.

        Comm: a send and a receive of this rank's part of the gradient, on these two ranks.
        """
        other = self._cut.other_end
        if other is None or not parts[EMBEDDING].tensor.requires_grad:
            return
        gradient = parts[EMBEDDING].ensured_gradient()
        if gradient.numel():
            self._peers.send(gradient, other, TIED)
            theirs = self._peers.receive(tuple(gradient.shape), gradient.dtype, other, TIED).wait()
            self._peers.finish()  # not before may it change
            gradient += theirs

    def _run(
        self,
        batches: Sequence[Batch],
        objective: Objective,
        scaled: Callable[[Tensor], Tensor],
        *,
        is_evaluation: bool,
    ) -> Tensor:
        self._batches = [self._share(batch.to(self._world.device)) for batch in batches]
        self._objective, self._scaled = objective, scaled
        self._loss_sum = torch.zeros((), dtype=torch.float64, device=self._world.device)
        runtime = self._runtime(len(batches), is_evaluation=is_evaluation)
        runtime.run()
        self.trace = runtime.trace
        self._batches = ()
        return self._loss_sum

    def _forward(self, stage: int, microbatch: int, x: Tensor | None) -> Tensor:
        model, batch = self._models[stage], self._batches[microbatch]
        if isinstance(model, StageModel):
            model.given = x
            y = self._run_stage(lambda: self._objective(model, batch), stage == 0)
        else:
            y = self._objective(model, batch)
        if stage != self._cut.last or self._spread:
            return y
        self._see(y)
        return self._scaled(y)

    def _see(self, loss: Tensor) -> None:
        self._loss_sum += loss.detach()

    def _runtime(self, num_microbatches: int, *, is_evaluation: bool) -> Runtime:
        """Made once for each number of micro-batches."""
        key = num_microbatches, is_evaluation
        if key not in self._runtimes:
            rank = self._world.coordinate("pp")
            actions = (self._waves if is_evaluation else self._actions)(num_microbatches)
            if self._spread:
                actions = spread_vocabulary(actions, self._spread.num_barriers, self._spread.costs)
            self._runtimes[key] = Runtime(
                add_transfers(actions)[rank],
                self._cut.ranks,
                forward=self._forward,
                border=lambda _stage: self._border(),
                peers=self._peers,
                deferred=self._deferred,
                ends=self._ends(actions),
                on_ready=self._on_ready,
                finished=lambda _action: self._finished(),
                clock=self._clock,
            )
        return self._runtimes[key]

    def _border(self) -> Border:
        return self._border_of(tuple(self._batches[0].tokens_BT.shape))

    def _ends(self, actions: RankActions) -> Ends:
        spread = self._spread
        if spread is None:
            return EDGE_ENDS
        words = Words(
            model=spread.model,
            shares=spread.shares,
            line=line_of(actions),
            peers=self._word_peers,
            border=self._border,
            call=lambda model, microbatch: self._objective(model, self._batches[microbatch]),
            run=spread.run,
            on_ready=self._on_ready,
            finished=lambda _action: self._finished(),
        )
        head = SpreadHead(
            words, spread.num_barriers, scaled=lambda loss: self._scaled(loss), seen=self._see
        )
        return SpreadEnds(SpreadEmbedding(words), head, self._word_peers)

    def _actions(self, num_microbatches: int) -> RankActions:
        num_ranks = self._world.degree("pp")
        return self._schedule.actions(num_ranks, self._stages_per_rank, num_microbatches)

    def _waves(self, num_microbatches: int) -> RankActions:
        """Forward passes alone, of any number of micro-batches."""
        stages = [
            [stage for stage, of in self._cut.ranks.items() if of == rank]
            for rank in range(self._world.degree("pp"))
        ]
        passes = (
            tuple(
                Action(Kind.FORWARD, stage, microbatch)
                for stage in own
                for microbatch in range(num_microbatches)
            )
            for own in stages
        )
        return forward_only(tuple(passes))
