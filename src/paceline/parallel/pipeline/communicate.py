"""Transfers between ranks: where each rank sends and receives, and whether all of it can run.

A channel is what one rank sends another of one kind, outputs of stages for example; what is sent
first arrives first. What stays on one rank is handed over without a transfer. Of a vocabulary that
is spread over the ranks, one action sends to several ranks or receives from several.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import NamedTuple

from paceline.parallel.pipeline.base import (
    COMPUTES,
    STAGE_PASSES,
    VOCABULARY_PASSES,
    Action,
    Kind,
    Line,
    RankActions,
    ended_by,
    line_of,
    needs,
)


class _Hop(NamedTuple):
    """What crosses from rank to rank.

    Attributes:
        made_by: the passes after which it is sent.
        send: the kind of its sends.
        receive: the kind of its receives.
        taken_by: the passes that need it.
        ends: what it is that others need: see `paceline.parallel.pipeline.base.ended_by`.
        is_gathered: whether those who receive it make one too. They receive after that: by then
            they know how large the others' are, and transfers have the longest time.
    """

    made_by: tuple[Kind, ...]
    send: Kind
    receive: Kind
    taken_by: tuple[Kind, ...]
    ends: Kind
    is_gathered: bool = False


_BACKWARD = (Kind.BACKWARD, Kind.BACKWARD_INPUT)
_SCORE = (Kind.SCORE, Kind.SCORE_INPUT)
_HOPS = (
    _Hop((Kind.FORWARD,), Kind.SEND_FORWARD, Kind.RECEIVE_FORWARD, (Kind.FORWARD,), Kind.FORWARD),
    _Hop(_BACKWARD, Kind.SEND_BACKWARD, Kind.RECEIVE_BACKWARD, _BACKWARD, Kind.BACKWARD_INPUT),
    _Hop(
        (Kind.EMBED,),
        Kind.SEND_ROWS,
        Kind.RECEIVE_ROWS,
        (Kind.FORWARD,),
        Kind.EMBED,
        is_gathered=True,
    ),
    _Hop(
        _BACKWARD,
        Kind.SEND_ROW_GRADIENTS,
        Kind.RECEIVE_ROW_GRADIENTS,
        (Kind.EMBED_WEIGHT,),
        Kind.BACKWARD_INPUT,
    ),
    _Hop((Kind.FORWARD,), Kind.SEND_HIDDEN, Kind.RECEIVE_HIDDEN, _SCORE, Kind.FORWARD),
    _Hop(
        _SCORE,
        Kind.SEND_STATISTICS,
        Kind.RECEIVE_STATISTICS,
        (Kind.SCORE_BACKWARD, Kind.SCORE_WEIGHT, Kind.LOSS),
        Kind.SCORE,
        is_gathered=True,
    ),
    _Hop(
        (Kind.SCORE_BACKWARD, Kind.SCORE_INPUT),
        Kind.SEND_TERM,
        Kind.RECEIVE_TERM,
        _BACKWARD,
        Kind.SCORE_INPUT,
        is_gathered=True,
    ),
)
_SENT_BY = {hop.send: hop for hop in _HOPS}
# How many of each of `STAGE_PASSES` a micro-batch may have on a stage.
_WHOLE = ((1, 1, 0, 0), (1, 0, 1, 1))
# The same of `VOCABULARY_PASSES` and a share.
_WHOLE_SHARE = ((1, 1, 1, 1, 0, 0, 0), (1, 1, 0, 0, 1, 1, 0))
# Of these a receive stands one pass before it must, so that the transfer has that long.
_EARLY = (Kind.RECEIVE_HIDDEN, Kind.RECEIVE_ROW_GRADIENTS)
SENDS = tuple(hop.send for hop in _HOPS)
RECEIVES = tuple(hop.receive for hop in _HOPS)


class Channel(NamedTuple):
    """From one rank to another: what is sent by actions of one kind."""

    source: int
    destination: int
    send: Kind


def add_transfers(actions: RankActions) -> RankActions:
    """The passes of all ranks with sends and receives between them.

    A send follows the pass that makes the tensor. A receive stands just before the pass that
    takes it, or before an earlier one where its channel brings later tensors that are taken first,
    or where a transfer could be hidden behind that; what is gathered is received after a rank's
    own has been sent.
    """
    line = line_of(actions)
    arrivals: list[dict[Channel, list[Action]]] = [{} for _ in actions]
    for send in (send for own in actions for action in own for send in sends_after(action, line)):
        for receive in other_ends(send, line):
            if not _SENT_BY[send.kind].is_gathered:
                channel = _channel(send, receive, line)
                arrivals[channel.destination].setdefault(channel, []).append(receive)
    return tuple(
        _with_transfers(own, line, receives)
        for own, receives in zip(actions, arrivals, strict=True)
    )


def _with_transfers(
    own: Sequence[Action], line: Line, arrivals: dict[Channel, list[Action]]
) -> tuple[Action, ...]:
    taken_at = {
        receive: index
        for index, action in enumerate(own)
        for receive in receives_before(action, line)
    }
    before: list[list[Action]] = [[] for _ in own]
    for receives in arrivals.values():
        latest = len(own)
        for receive in reversed(receives):
            latest = min(latest, max(0, taken_at[receive] - (receive.kind in _EARLY)))
            before[latest].insert(0, receive)
    out: list[Action] = []
    for action, receives in zip(own, before, strict=True):
        out += [*receives, action, *sends_after(action, line), *_gathers_after(action, line)]
    return tuple(out)


def other_ends(transfer: Action, line: Line) -> tuple[Action, ...]:
    """The receives of a send, the sends of a receive: those on other ranks; may be none."""
    kind, stage, microbatch = transfer
    match kind:
        case Kind.SEND_FORWARD:
            found = _neighbour(Kind.RECEIVE_FORWARD, stage + 1, line)
        case Kind.RECEIVE_FORWARD:
            found = _neighbour(Kind.SEND_FORWARD, stage - 1, line)
        case Kind.SEND_BACKWARD:
            found = _neighbour(Kind.RECEIVE_BACKWARD, stage - 1, line)
        case Kind.RECEIVE_BACKWARD:
            found = _neighbour(Kind.SEND_BACKWARD, stage + 1, line)
        case Kind.SEND_ROWS:
            found = [(Kind.RECEIVE_ROWS, 0)]
        case Kind.RECEIVE_ROWS:
            found = _shares(Kind.SEND_ROWS, line, stage == 0)
        case Kind.SEND_ROW_GRADIENTS:
            found = _shares(Kind.RECEIVE_ROW_GRADIENTS, line, stage == 0)
        case Kind.RECEIVE_ROW_GRADIENTS:
            found = [(Kind.SEND_ROW_GRADIENTS, 0)]
        case Kind.SEND_HIDDEN:
            found = _shares(Kind.RECEIVE_HIDDEN, line, stage == line.last)
        case Kind.RECEIVE_HIDDEN:
            found = [(Kind.SEND_HIDDEN, line.last)]
        case Kind.SEND_STATISTICS:
            found = _shares(Kind.RECEIVE_STATISTICS, line)
        case Kind.RECEIVE_STATISTICS:
            found = _shares(Kind.SEND_STATISTICS, line)
        case Kind.SEND_TERM:
            found = [(Kind.RECEIVE_TERM, line.last)]
        case Kind.RECEIVE_TERM:
            found = _shares(Kind.SEND_TERM, line, stage == line.last)
        case _:
            raise ValueError(f"{transfer} is no transfer")
    own = line.ranks[stage]
    return tuple(Action(end, at, microbatch) for end, at in found if line.ranks[at] != own)


def _neighbour(kind: Kind, stage: int, line: Line) -> list[tuple[Kind, int]]:
    return [(kind, stage)] if stage in line.ranks else []


def _shares(kind: Kind, line: Line, is_here: bool = True) -> list[tuple[Kind, int]]:
    return [(kind, share) for share in line.shares] if is_here else []


def sends_after(action: Action, line: Line) -> tuple[Action, ...]:
    """What is sent of what a pass has made."""
    sends = (action._replace(kind=hop.send) for hop in _HOPS if action.kind in hop.made_by)
    return tuple(send for send in sends if other_ends(send, line))


def receives_before(action: Action, line: Line) -> tuple[Action, ...]:
    """What a pass needs of other ranks."""
    receives = [action._replace(kind=hop.receive) for hop in _HOPS if action.kind in hop.taken_by]
    if action.kind in _BACKWARD and action.stage == line.last and line.shares:
        # What scales terms that know their own share alone.
        share = line.share_of(line.ranks[line.last])
        receives.append(Action(Kind.RECEIVE_STATISTICS, share, action.microbatch))
    return tuple(receive for receive in receives if other_ends(receive, line))


def _gathers_after(action: Action, line: Line) -> Iterable[Action]:
    """What is received of others once a rank has made its own."""
    for hop in _HOPS:
        if hop.is_gathered and action.kind in hop.made_by:
            ends = {Kind.RECEIVE_ROWS: 0, Kind.RECEIVE_TERM: line.last}
            stage = ends.get(hop.receive, action.stage)
            receive = Action(hop.receive, stage, action.microbatch)
            if line.ranks[stage] == line.ranks[action.stage] and other_ends(receive, line):
                yield receive


def _channel(send: Action, receive: Action, line: Line) -> Channel:
    return Channel(line.ranks[send.stage], line.ranks[receive.stage], send.kind)


def channels_of(transfer: Action, line: Line) -> dict[Channel, Action]:
    """The channels of a send or receive, each with the send at its one end."""
    ends = other_ends(transfer, line)
    if transfer.kind in SENDS:
        return {_channel(transfer, receive, line): transfer for receive in ends}
    return {_channel(send, transfer, line): send for send in ends}


def check(actions: RankActions, num_microbatches: int) -> None:
    """Proves that ranks can run their passes and transfers, where no send waits for its receive.

    Raises:
        ValueError: a pass is missing or there twice, a stage is on two ranks, a tensor that is
            needed is not sent or not received in its channel's order, or ranks wait for something
            that never comes; says which.
    """
    line = line_of(actions)
    _check_passes(actions, line, num_microbatches)
    _check_channels(actions, line)
    _check_progress(actions, line)


def _check_passes(actions: RankActions, line: Line, num_microbatches: int) -> None:
    """Each stage is on one rank and has every micro-batch's passes once; so has each share."""
    for rank, own in enumerate(actions):
        for action in own:
            if line.ranks[action.stage] != rank:
                raise ValueError(f"{action} is on rank {rank}: its stage is on another rank too")
    if sorted(line.ranks) != list(range(len(line.ranks))):
        raise ValueError(f"there are passes of stages {sorted(line.ranks)}: some stage has none")
    if line.shares and [line.ranks[share] for share in line.shares] != list(range(len(actions))):
        raise ValueError(f"there are shares {line.shares}: some rank has none, or two")
    found = Counter(action for own in actions for action in own if action.kind in COMPUTES)
    owners = (
        *(("stage", stage, STAGE_PASSES, _WHOLE) for stage in sorted(line.ranks)),
        *(("share", share, VOCABULARY_PASSES, _WHOLE_SHARE) for share in line.shares),
    )
    for what, stage, kinds, legal in owners:
        for microbatch in range(num_microbatches):
            counts = tuple(found.pop(Action(kind, stage, microbatch), 0) for kind in kinds)
            if counts not in legal:
                named = ", ".join(f"{n} {kind}" for n, kind in zip(counts, kinds, strict=True))
                raise ValueError(f"{what} {stage} has of micro-batch {microbatch} {named}")
    if found:
        raise ValueError(f"{min(found)} is of no micro-batch below {num_microbatches}")


def _check_channels(actions: RankActions, line: Line) -> None:
    """What must cross from rank to rank is sent once, and received in the order of its channel."""
    sent: dict[Channel, list[Action]] = {}
    received: dict[Channel, list[Action]] = {}
    for rank, own in enumerate(actions):
        for action in own:
            if action.kind not in COMPUTES:
                ends = sent if action.kind in SENDS else received
                for channel, send in channels_of(action, line).items():
                    ends.setdefault(channel, []).append(send)
        due = Counter(send for action in own for send in sends_after(action, line))
        found = Counter(action for action in own if action.kind in SENDS)
        if due != found:
            wrong = min((due - found) or (found - due))
            raise ValueError(f"rank {rank} has {wrong} {found[wrong]} time(s), not {due[wrong]}")
    for channel in sorted(sent.keys() | received.keys()):
        for due_next, found_next in zip_longest(sent.get(channel, []), received.get(channel, [])):
            if due_next != found_next:
                rule = f"{channel} brings {due_next}, but {found_next} is what is received"
                raise ValueError(rule)


def _check_progress(actions: RankActions, line: Line) -> None:
    """Every rank gets to its end."""
    positions = [0] * len(actions)
    done: set[Action] = set()

    def can_run(action: Action) -> bool:
        if action.kind in RECEIVES:
            return True  # it is posted, and the pass that takes the tensor waits
        if action.kind in SENDS:
            return action._replace(kind=_SENT_BY[action.kind].ends) in done
        receives = receives_before(action, line)
        are_there = all({receive, *other_ends(receive, line)} <= done for receive in receives)
        return are_there and all(need in done for need in needs(action, line))

    has_moved = True
    while has_moved:
        has_moved = False
        for rank, own in enumerate(actions):
            while positions[rank] < len(own) and can_run(own[positions[rank]]):
                done |= set(ended_by(own[positions[rank]]))
                positions[rank] += 1
                has_moved = True
    stuck = [own[at] for own, at in zip(actions, positions, strict=True) if at < len(own)]
    if stuck:
        raise ValueError(f"ranks wait for what never comes, at {stuck}")
