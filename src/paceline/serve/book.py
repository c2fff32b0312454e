"""The requests that have not ended: who runs, who waits, and which blocks each of them holds."""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from typing import overload

from paceline.serve.executor.base import Work
from paceline.serve.kv.owner import KVOwner, extend
from paceline.serve.kv.pool import Key
from paceline.serve.request import RequestState
from paceline.serve.schedule.base import RequestView, Share, View


class Book:
    """Keeps requests and blocks in step with each other; owned by the engine's thread.

    Args:
        num_blocks: for keys and values.
        block_size: tokens to a block.
        num_virtual: virtual tokens before every request; with them nothing is found in the cache.
    """

    def __init__(self, num_blocks: int, block_size: int, num_virtual: int = 0) -> None:
        self.kv = KVOwner(num_blocks, block_size)
        self.running: dict[int, RequestState] = {}  # in order of admission
        self.waiting: OrderedDict[int, RequestState] = OrderedDict()  # by arrival, preempted first
        self._deadlines: list[tuple[float, int]] = []  # a heap, of ended requests too
        self.num_preempted = 0
        self.num_prompt_tokens = self.num_found_tokens = 0  # of admitted requests
        self._num_virtual = num_virtual

    def __len__(self) -> int:
        return len(self.running) + len(self.waiting)

    def open(self) -> Iterator[RequestState]:
        """All requests that have not ended."""
        yield from self.running.values()
        yield from self.waiting.values()

    def get(self, request_id: int) -> RequestState | None:
        """A request that has not ended."""
        return self.running.get(request_id) or self.waiting.get(request_id)

    def add(self, states: Iterable[RequestState]) -> None:
        """Requests that have come; they wait."""
        for state in states:
            self.waiting[state.id] = state
            if state.deadline_s < math.inf:
                heapq.heappush(self._deadlines, (state.deadline_s, state.id))

    def late(self, now_s: float) -> list[int]:
        """Requests whose time is up, each told once; what a step has a part of, once it is done."""
        due: list[tuple[float, int]] = []
        while self._deadlines and self._deadlines[0][0] <= now_s:
            due.append(heapq.heappop(self._deadlines))
        states = [state for _, number in due if (state := self.get(number))]
        for state in states:
            if state.is_busy:
                heapq.heappush(self._deadlines, (state.deadline_s, state.id))
        return [state.id for state in states if not state.is_busy]

    def view(self) -> View:
        """What the policy sees; of waiting requests no more than it reads."""
        return View(
            running=[self._running_view(state) for state in self.running.values()],
            waiting=_Lazy(self._waiting_views(), len(self.waiting)),
            num_free=self.kv.pool.num_free,
            block_size=self.kv.block_size,
            num_virtual=self._num_virtual,
        )

    def preempt(self, request_id: int) -> None:
        """Takes a running request's blocks away; it waits again, before all others."""
        state = self.running.pop(request_id)
        assert not state.is_busy, f"request {request_id} is preempted, and a step has a part of it"
        self.kv.release(request_id)
        state.begin_anew()
        self.num_preempted += 1
        self.waiting[request_id] = state
        self.waiting.move_to_end(request_id, last=False)

    def work(self, share: Share, now_s: float) -> Work:
        """A request's part of a step, with blocks for it; one that waits is admitted."""
        number = share.request_id
        found: list[int] = []
        if number in self.waiting:
            state = self.running[number] = self.waiting.pop(number)
            found = self.kv.begin(number, self._keys(state), self._most_found(state))
            state.num_computed = len(found) * self.kv.block_size
            if state.num_found is None:  # else it has been preempted, and finds its own
                state.num_found = state.num_computed
            state.admitted_s = now_s if state.admitted_s is None else state.admitted_s
            self.num_prompt_tokens += len(state.tokens)
            self.num_found_tokens += state.num_computed
        state = self.running[number]
        assert not state.is_busy, f"request {number} has a share of two steps at a time"
        state.is_busy = True
        start, end = state.num_computed, state.num_computed + share.num_tokens
        new = self.kv.reserve(number, end + self._num_virtual)
        return Work(
            request_id=number,
            tokens=tuple(state.tokens[start:end]),
            start=start,
            new_blocks=(*found, *new),
            draw=state.draw() if end == len(state.tokens) else None,
            adapter=state.request.adapter,
            scored=state.scored(start, end),
            num_top=state.request.num_prompt_logprobs or 0,
        )

    def computed(self, share: Share) -> RequestState:
        """A request's part of a step has been computed."""
        state = self.running[share.request_id]
        state.is_busy = False
        state.num_computed += share.num_tokens
        if not self._num_virtual:
            extend(state.keys, state.root, state.tokens, self.kv.block_size)
            self.kv.commit(state.id, state.keys, state.num_computed)
        return state

    def end(self, request_id: int) -> RequestState:
        """A request has ended; its blocks are free."""
        self.kv.release(request_id)
        mine = self.running if request_id in self.running else self.waiting
        return mine.pop(request_id)

    def forget_blocks(self) -> None:
        """All keys and values are gone."""
        self.kv = KVOwner(self.kv.pool.num_blocks, self.kv.block_size)

    def _keys(self, state: RequestState) -> Sequence[Key]:
        """Names of the blocks that a request's tokens fill."""
        if self._num_virtual or state.wants_scores:
            return ()
        extend(state.keys, state.root, state.tokens, self.kv.block_size)
        return state.keys

    def _most_found(self, state: RequestState) -> int:
        """Blocks that a request may find; its last token is always computed."""
        return (len(state.tokens) - 1) // self.kv.block_size

    def _running_view(self, state: RequestState) -> RequestView:
        return RequestView(
            id=state.id,
            arrival_s=state.arrival_s,
            num_prompt=len(state.request.prompt_ids),
            num_computed=state.num_computed,
            num_total=len(state.tokens),
            max_total=state.max_total,
            num_blocks=self.kv.num_blocks(state.id),
            num_freed=self.kv.num_own(state.id),
            is_busy=state.is_busy,
        )

    def _waiting_views(self) -> Iterator[RequestView]:
        before: dict[Key, int] = {}  # what those who wait would compute, and the first of each
        for state in self.waiting.values():
            keys, most = self._keys(state), self._most_found(state)
            found = self.kv.found(keys[:most])
            follows = None
            if len(found) < min(most, len(keys)):
                key = keys[len(found)]
                follows = self.kv.computing(key)
                follows = before.get(key) if follows is None else follows
            yield self._waiting_view(state, found, follows)
            for key in keys[len(found) :]:
                before.setdefault(key, state.id)

    def _waiting_view(
        self, state: RequestState, found: Sequence[int], follows: int | None
    ) -> RequestView:
        return RequestView(
            id=state.id,
            arrival_s=state.arrival_s,
            num_prompt=len(state.request.prompt_ids),
            num_computed=len(found) * self.kv.block_size,
            num_total=len(state.tokens),
            max_total=state.max_total,
            num_blocks=len(found),
            num_freed=self.kv.num_unheld(found),
            follows=follows,
        )


class _Lazy(Sequence[RequestView]):
    """Views that are made as they are read.

    Args:
        views: in order.
        most: of them there can be.
    """

    def __init__(self, views: Iterator[RequestView], most: int) -> None:
        self._views, self._most = views, most
        self._made: list[RequestView] = []

    def __len__(self) -> int:
        """How many there are: all of them are made."""
        self._make(self._most)
        return len(self._made)

    def __bool__(self) -> bool:
        self._make(1)
        return bool(self._made)

    def __iter__(self) -> Iterator[RequestView]:
        index = 0
        while True:
            self._make(index + 1)
            if index == len(self._made):
                return
            yield self._made[index]
            index += 1

    @overload
    def __getitem__(self, index: int) -> RequestView: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[RequestView]: ...
    def __getitem__(self, index: int | slice) -> RequestView | Sequence[RequestView]:
        stop = index.stop if isinstance(index, slice) else index + 1
        self._make(self._most if stop is None or stop <= 0 else stop)
        return self._made[index]

    def _make(self, count: int) -> None:
        while len(self._made) < count:
            view = next(self._views, None)
            if view is None:
                return
            self._made.append(view)
