"""Runs what a schedule says, action by action: the one runtime of all schedules, and of none."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from paceline.core.clock import Clock
from paceline.dist.p2p import PendingTensor, PointToPoint
from paceline.kernels.deferred import DeferredGradients
from paceline.parallel.pipeline.base import Action, Kind
from paceline.parallel.pipeline.timeline import Span

PURPOSES = ("activations", "activation gradients")
"""What ranks of a pipeline send each other: the purposes of their `PointToPoint`."""


class Border(NamedTuple):
    """Between two stages: shape and dtype of what one micro-batch's output is, and its gradient."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Forward(Protocol):
    """Runs one stage of this rank on one micro-batch.

    Args:
        stage: of the model.
        microbatch: of the step.
        x: the output of the stage before; None for the first stage.

    Returns:
        What the next stage takes; of the last stage what the model's ends take, or the loss as a
        scalar, scaled as its gradient is to be.
    """

    def __call__(self, stage: int, microbatch: int, x: Tensor | None) -> Tensor: ...


Handler = Callable[[Action], None]
"""Runs an action of one kind."""


class Ends(Protocol):
    """What comes before the first stage and after the last, if that is no part of them.

    Attributes:
        handlers: run actions of kinds that stages do not have.
    """

    @property
    def handlers(self) -> Mapping[Kind, Handler]: ...

    def first_input(self, microbatch: int) -> Tensor | None:
        """What the first stage takes; None where it begins with tokens."""
        ...

    def take_first_gradient(self, microbatch: int, gradient: Tensor) -> None:
        """The gradient of the first stage's input."""
        ...

    def take_last_output(self, microbatch: int, y: Tensor) -> None:
        """What the last stage has made, without its graph."""
        ...

    def last_gradient(self, microbatch: int) -> Tensor | None:
        """The gradient of the last stage's output; None where that is a loss."""
        ...

    def finish(self) -> None:
        """Called after a step's actions: returns once what was sent has been taken."""
        ...


class EdgeEnds:
    """The first stage takes tokens, the last gives a loss."""

    handlers: Mapping[Kind, Handler] = MappingProxyType({})

    def first_input(self, microbatch: int) -> None:
        pass

    def take_first_gradient(self, microbatch: int, gradient: Tensor) -> None:
        pass

    def take_last_output(self, microbatch: int, y: Tensor) -> None:
        pass

    def last_gradient(self, microbatch: int) -> None:
        pass

    def finish(self) -> None:
        pass


EDGE_ENDS = EdgeEnds()


class Runtime:
    """One rank of a pipeline.

    Parameters' gradients are added up in ``grad``, in the order of the actions. An activation is
    freed by the backward pass that takes it, what a weight pass needs by that.

    Args:
        actions: this rank's, with transfers; forward passes alone for an evaluation, run under
            ``torch.no_grad``.
        ranks: the rank on the pipeline's axis of every stage of the model.
        forward: runs a stage.
        border: of a stage's input, for all but the first.
        peers: the other ranks of the pipeline, for `PURPOSES`.
        deferred: what the stages' linear layers owe, where backward passes are split.
        ends: of the model.
        on_ready: is told of each parameter whose gradient a weight pass has added to.
        finished: is called after each backward and weight pass.
        clock: of the trace; on a GPU it sees when passes are queued, not when they run.

    Attributes:
        trace: what the last run did, in seconds on the clock.
    """

    def __init__(
        self,
        actions: Sequence[Action],
        ranks: Mapping[int, int],
        *,
        forward: Forward,
        border: Callable[[int], Border],
        peers: PointToPoint,
        deferred: DeferredGradients,
        ends: Ends = EDGE_ENDS,
        on_ready: Callable[[Tensor], None] | None = None,
        finished: Callable[[Action], None],
        clock: Clock,
    ) -> None:
        self.actions = actions
        self.trace: list[Span] = []
        self._ranks = ranks
        self._stage_forward = forward
        self._border = border
        self._peers = peers
        self._deferred = deferred
        self._ends = ends
        self._on_ready = on_ready
        self._finished = finished
        self._clock = clock
        self._mail: dict[Action, Tensor | PendingTensor] = {}
        self._kept: dict[tuple[int, int], tuple[Tensor | None, Tensor]] = {}
        self._run_action: dict[Kind, Handler] = {
            **ends.handlers,
            Kind.FORWARD: self._forward,
            Kind.BACKWARD: self._backward,
            Kind.BACKWARD_INPUT: self._backward_input,
            Kind.BACKWARD_WEIGHT: self._backward_weight,
            Kind.SEND_FORWARD: self._send,
            Kind.SEND_BACKWARD: self._send,
            Kind.RECEIVE_FORWARD: self._receive,
            Kind.RECEIVE_BACKWARD: self._receive,
        }

    def run(self) -> None:
        """Runs the actions; then everything that was sent has been taken."""
        self.trace = []
        for action in self.actions:
            start_s = self._clock.now_s()
            self._run_action[action.kind](action)
            self.trace.append(Span(action, start_s, self._clock.now_s()))
        self._peers.finish()
        assert not self._mail, f"nobody has taken {list(self._mail)}"
        assert not self._kept, f"nobody has gone back through {list(self._kept)}"
        self._ends.finish()

    def _forward(self, action: Action) -> None:
        _, stage, microbatch = action
        if stage:
            x = self._take(action._replace(kind=Kind.RECEIVE_FORWARD))
        else:
            x = self._ends.first_input(microbatch)
        if x is not None:
            x.requires_grad_(torch.is_grad_enabled())
        y = self._stage_forward(stage, microbatch, x)
        if torch.is_grad_enabled():
            self._kept[stage, microbatch] = (x, y)
        if stage == len(self._ranks) - 1:
            self._ends.take_last_output(microbatch, y.detach())
        else:
            self._leave(action._replace(kind=Kind.SEND_FORWARD), y.detach())

    def _backward(self, action: Action) -> None:
        self._backpropagate(action)
        self._finished(action)

    def _backward_input(self, action: Action) -> None:
        with self._deferred.under((action.stage, action.microbatch)):
            self._backpropagate(action)
        self._finished(action)

    def _backward_weight(self, action: Action) -> None:
        self._deferred.compute((action.stage, action.microbatch), self._on_ready)
        self._finished(action)

    def _backpropagate(self, action: Action) -> None:
        _, stage, microbatch = action
        x, y = self._kept.pop((stage, microbatch))
        if stage == len(self._ranks) - 1:
            grad_y = self._ends.last_gradient(microbatch)
        else:
            grad_y = self._take(action._replace(kind=Kind.RECEIVE_BACKWARD))
        if y.requires_grad:  # not so where the first stage is frozen
            y.backward(grad_y)
        if x is not None:
            assert x.grad is not None, f"{action}: the output does not depend on the input"
            if stage:
                self._leave(action._replace(kind=Kind.SEND_BACKWARD), x.grad)
            else:
                self._ends.take_first_gradient(microbatch, x.grad)

    def _leave(self, send: Action, tensor: Tensor) -> None:
        """Hands on what a pass has made: to its send, or to a stage that is here too."""
        is_forward = send.kind is Kind.SEND_FORWARD
        other = send.stage + (1 if is_forward else -1)
        receive = Kind.RECEIVE_FORWARD if is_forward else Kind.RECEIVE_BACKWARD
        is_here = self._ranks[other] == self._ranks[send.stage]
        self._mail[Action(receive, other, send.microbatch) if is_here else send] = tensor

    def _take(self, receive: Action) -> Tensor:
        """What a pass needs, once it is here."""
        found = self._mail.pop(receive)
        return found.wait() if isinstance(found, PendingTensor) else found

    def _send(self, action: Action) -> None:
        tensor = self._mail.pop(action)
        assert isinstance(tensor, Tensor)
        self._peers.send(tensor, self._peer(action), _purpose(action))

    def _receive(self, action: Action) -> None:
        is_forward = action.kind is Kind.RECEIVE_FORWARD
        border = self._border(action.stage if is_forward else action.stage + 1)
        self._mail[action] = self._peers.receive(*border, self._peer(action), _purpose(action))

    def _peer(self, transfer: Action) -> int:
        is_to_next = transfer.kind in (Kind.SEND_FORWARD, Kind.RECEIVE_BACKWARD)
        return self._ranks[transfer.stage + (1 if is_to_next else -1)]


def _purpose(transfer: Action) -> str:
    return PURPOSES[transfer.kind in (Kind.SEND_BACKWARD, Kind.RECEIVE_BACKWARD)]
