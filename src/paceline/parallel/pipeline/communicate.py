"""Transfers between ranks: where each rank sends and receives, and whether all of it can run.

A channel is what one rank sends another of one kind, outputs of stages or gradients; what is sent
first arrives first. Two stages on one rank hand over without a transfer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import zip_longest
from typing import NamedTuple

from paceline.parallel.pipeline.base import (
    COMPUTES,
    Action,
    Kind,
    RankActions,
    ended_by,
    needs,
    ranks_of_stages,
)

_SEND_AFTER = {
    Kind.FORWARD: Kind.SEND_FORWARD,
    Kind.BACKWARD: Kind.SEND_BACKWARD,
    Kind.BACKWARD_INPUT: Kind.SEND_BACKWARD,
}
_RECEIVE_BEFORE = {
    Kind.FORWARD: Kind.RECEIVE_FORWARD,
    Kind.BACKWARD: Kind.RECEIVE_BACKWARD,
    Kind.BACKWARD_INPUT: Kind.RECEIVE_BACKWARD,
}
# How many passes of each of `COMPUTES` a micro-batch may have on a stage.
_WHOLE = ((1, 1, 0, 0), (1, 0, 1, 1))
_MADE_BY = {Kind.SEND_FORWARD: Kind.FORWARD, Kind.SEND_BACKWARD: Kind.BACKWARD_INPUT}
SENDS = (Kind.SEND_FORWARD, Kind.SEND_BACKWARD)
RECEIVES = (Kind.RECEIVE_FORWARD, Kind.RECEIVE_BACKWARD)


class Channel(NamedTuple):
    """From one rank to another: outputs of stages, or gradients of them."""

    source: int
    destination: int
    is_forward: bool


def add_transfers(actions: RankActions) -> RankActions:
    """The passes of all ranks with sends and receives between them.

    A send follows the pass that makes the tensor. A receive stands just before the pass that
    takes it, or before an earlier one where its channel brings later tensors that are taken first.
    """
    ranks = ranks_of_stages(actions)
    arrivals: list[dict[Channel, list[Action]]] = [{} for _ in actions]
    for send in (_transfer(a, _SEND_AFTER, ranks) for own in actions for a in own):
        if send:
            channel = channel_of(send, ranks)
            arrivals[channel.destination].setdefault(channel, []).append(other_end(send))
    return tuple(
        _with_transfers(own, ranks, receives)
        for own, receives in zip(actions, arrivals, strict=True)
    )


def _with_transfers(
    own: Sequence[Action], ranks: dict[int, int], arrivals: dict[Channel, list[Action]]
) -> tuple[Action, ...]:
    taken_at = {_transfer(a, _RECEIVE_BEFORE, ranks): index for index, a in enumerate(own)}
    before: list[list[Action]] = [[] for _ in own]
    for receives in arrivals.values():
        latest = len(own)
        for receive in reversed(receives):
            latest = min(latest, taken_at[receive])
            before[latest].insert(0, receive)
    out: list[Action] = []
    for action, receives in zip(own, before, strict=True):
        send = _transfer(action, _SEND_AFTER, ranks)
        out += [*receives, action, *([send] if send else [])]
    return tuple(out)


def other_end(transfer: Action) -> Action:
    """The receive of a send, the send of a receive."""
    kind, stage, microbatch = transfer
    match kind:
        case Kind.SEND_FORWARD:
            return Action(Kind.RECEIVE_FORWARD, stage + 1, microbatch)
        case Kind.RECEIVE_FORWARD:
            return Action(Kind.SEND_FORWARD, stage - 1, microbatch)
        case Kind.SEND_BACKWARD:
            return Action(Kind.RECEIVE_BACKWARD, stage - 1, microbatch)
        case Kind.RECEIVE_BACKWARD:
            return Action(Kind.SEND_BACKWARD, stage + 1, microbatch)
        case _:
            raise ValueError(f"{transfer} is no transfer")


def channel_of(transfer: Action, ranks: dict[int, int]) -> Channel:
    """The channel of a send or receive, given the rank of every stage."""
    is_forward = transfer.kind in (Kind.SEND_FORWARD, Kind.RECEIVE_FORWARD)
    own, peer = ranks[transfer.stage], ranks[other_end(transfer).stage]
    ends = (own, peer) if transfer.kind in SENDS else (peer, own)
    return Channel(*ends, is_forward)


def _transfer(action: Action, kinds: dict[Kind, Kind], ranks: dict[int, int]) -> Action | None:
    """The transfer that goes with a pass; None where there is none, or its ends are one rank."""
    if action.kind not in kinds:
        return None
    transfer = action._replace(kind=kinds[action.kind])
    peer = ranks.get(other_end(transfer).stage)  # none beyond both ends of the model
    return None if peer in (None, ranks[action.stage]) else transfer


def check(actions: RankActions, num_microbatches: int) -> None:
    """Proves that ranks can run their passes and transfers, where no send waits for its receive.

    Raises:
        ValueError: a pass is missing or there twice, a stage is on two ranks, a tensor that is
            needed is not sent or not received in its channel's order, or ranks wait for something
            that never comes; says which.
    """
    ranks = ranks_of_stages(actions)
    _check_passes(actions, ranks, num_microbatches)
    _check_channels(actions, ranks)
    _check_progress(actions, ranks)


def _check_passes(actions: RankActions, ranks: dict[int, int], num_microbatches: int) -> None:
    """Each stage is on one rank and has every micro-batch's passes once."""
    for rank, own in enumerate(actions):
        for action in own:
            if ranks[action.stage] != rank:
                raise ValueError(f"{action} is on rank {rank}: its stage is on another rank too")
    if sorted(ranks) != list(range(len(ranks))):
        raise ValueError(f"there are passes of stages {sorted(ranks)}: some stage has none")
    found = Counter(action for own in actions for action in own if action.kind in COMPUTES)
    for stage in sorted(ranks):
        for microbatch in range(num_microbatches):
            counts = tuple(found.pop(Action(kind, stage, microbatch), 0) for kind in COMPUTES)
            if counts not in _WHOLE:
                named = ", ".join(f"{n} {kind}" for n, kind in zip(counts, COMPUTES, strict=True))
                raise ValueError(f"stage {stage} has of micro-batch {microbatch} {named}")
    if found:
        raise ValueError(f"{min(found)} is of no micro-batch below {num_microbatches}")


def _check_channels(actions: RankActions, ranks: dict[int, int]) -> None:
    """What must cross from rank to rank is sent once, and received in the order of its channel."""
    sent: dict[Channel, list[Action]] = {}
    received: dict[Channel, list[Action]] = {}
    for rank, own in enumerate(actions):
        for action in own:
            if action.kind not in COMPUTES:
                ends = sent if action.kind in SENDS else received
                ends.setdefault(channel_of(action, ranks), []).append(action)
        due = Counter(filter(None, (_transfer(action, _SEND_AFTER, ranks) for action in own)))
        found = Counter(action for action in own if action.kind in SENDS)
        if due != found:
            wrong = min((due - found) or (found - due))
            raise ValueError(f"rank {rank} has {wrong} {found[wrong]} time(s), not {due[wrong]}")
    for channel in sorted(sent.keys() | received.keys()):
        pairs = zip_longest(map(other_end, sent.get(channel, [])), received.get(channel, []))
        for due_next, found_next in pairs:
            if due_next != found_next:
                rule = f"{channel} brings {due_next}, but {found_next} is what is received"
                raise ValueError(rule)


def _check_progress(actions: RankActions, ranks: dict[int, int]) -> None:
    """Every rank gets to its end."""
    positions = [0] * len(actions)
    done: set[Action] = set()

    def can_run(action: Action) -> bool:
        if action.kind in RECEIVES:
            return True  # it is posted, and the pass that takes the tensor waits
        if action.kind in SENDS:
            return action._replace(kind=_MADE_BY[action.kind]) in done
        receive = _transfer(action, _RECEIVE_BEFORE, ranks)
        is_there = receive is None or {receive, other_end(receive)} <= done
        return is_there and all(need in done for need in needs(action, len(ranks)))

    has_moved = True
    while has_moved:
        has_moved = False
        for rank, own in enumerate(actions):
            while positions[rank] < len(own) and can_run(own[positions[rank]]):
                done |= {own[positions[rank]], ended_by(own[positions[rank]])}
                positions[rank] += 1
                has_moved = True
    stuck = [own[at] for own, at in zip(actions, positions, strict=True) if at < len(own)]
    if stuck:
        raise ValueError(f"ranks wait for what never comes, at {stuck}")
