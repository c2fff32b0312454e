"""The requests that have not ended: who runs, who waits, and which blocks each of them holds."""

from __future__ import annotations

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
        self.waiting: dict[int, RequestState] = {}  # in order of arrival, preempted ones first
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
        self.waiting |= {state.id: state for state in states}

    def view(self) -> View:
        """What the policy sees; of waiting requests no more than it reads."""
        views = (self._waiting_view(state) for state in self.waiting.values())
        ready = (view for view in views if view is not None)
        return View(
            running=[self._running_view(state) for state in self.running.values()],
            waiting=_Lazy(ready, len(self.waiting)),
            num_free=self.kv.pool.num_free,
            block_size=self.kv.block_size,
            num_virtual=self._num_virtual,
        )

    def preempt(self, request_id: int) -> None:
        """Takes a running request's blocks away; it waits again, before all others."""
        state = self.running.pop(request_id)
        self.kv.release(request_id)
        state.num_computed = 0
        self.num_preempted += 1
        self.waiting = {request_id: state} | self.waiting

    def work(self, share: Share, now_s: float) -> Work:
        """A request's part of a step, with blocks for it; one that waits is admitted."""
        number = share.request_id
        found: list[int] = []
        if number in self.waiting:
            state = self.running[number] = self.waiting.pop(number)
            found = self.kv.begin(number, self._keys(state))
            state.num_computed = len(found) * self.kv.block_size
            state.admitted_s = now_s if state.admitted_s is None else state.admitted_s
            self.num_prompt_tokens += len(state.tokens)
            self.num_found_tokens += state.num_computed
        state = self.running[number]
        start, end = state.num_computed, state.num_computed + share.num_tokens
        new = self.kv.reserve(number, end + self._num_virtual)
        return Work(
            request_id=number,
            tokens=tuple(state.tokens[start:end]),
            start=start,
            new_blocks=(*found, *new),
            draw=state.draw() if end == len(state.tokens) else None,
            adapter=state.request.adapter,
        )

    def computed(self, share: Share) -> RequestState:
        """A request's part of a step has been computed."""
        state = self.running[share.request_id]
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
        """Names of the blocks that a request may find; its last token is always computed."""
        if self._num_virtual:
            return ()
        extend(state.keys, state.root, state.tokens, self.kv.block_size)
        return state.keys[: (len(state.tokens) - 1) // self.kv.block_size]

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
        )

    def _waiting_view(self, state: RequestState) -> RequestView | None:
        """None of one that would compute what another is computing: it waits until it finds it."""
        keys = self._keys(state)
        found = self.kv.found(keys)
        if self.kv.is_coming(keys, len(found)):
            return None
        return RequestView(
            id=state.id,
            arrival_s=state.arrival_s,
            num_prompt=len(state.request.prompt_ids),
            num_computed=len(found) * self.kv.block_size,
            num_total=len(state.tokens),
            max_total=state.max_total,
            num_blocks=len(found),
            num_freed=self.kv.num_unheld(found),
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
