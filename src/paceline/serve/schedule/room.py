"""What is left of a step's budget and of the blocks while a policy plans the step."""

from __future__ import annotations

from paceline.serve.schedule.base import Budget, RequestView, Share, StepPlan, View


class Room:
    """A step in the making.

    Args:
        view: that it is planned for.
        budget: that it must keep.
        to_end: whether who is admitted finds room for all that it may come to consist of, so that
            nobody is ever preempted; else for all that exists of it.

    Attributes:
        num_tokens: that the step can still compute.
    """

    def __init__(self, view: View, budget: Budget, *, to_end: bool = False) -> None:
        self.num_tokens = budget.max_batch_tokens
        self._view, self._budget, self._to_end = view, budget, to_end
        self._num_free = view.num_free
        self._victims = {r.id: r for r in view.running if not r.is_busy}  # the last goes first
        self._computing = {request.id for request in view.running}
        self._num_seats = budget.max_sequences - len(view.running)
        self._num_shares = budget.max_sequences if budget.max_shares is None else budget.max_shares
        # Of requests that run: blocks for the rest of each are spoken for.
        self._num_promised = sum(self._blocks_to_come(request) for request in view.running)
        self._has_prompt = False
        self._shares: list[Share] = []
        self._preempted: dict[int, None] = {}

    @property
    def is_empty(self) -> bool:
        """Whether the step computes nothing so far."""
        return not self._shares

    @property
    def is_closed(self) -> bool:
        """Whether nobody can be admitted.

        Nobody is in a step that has preempted: what was taken away comes first.
        """
        is_full = self.num_tokens == 0 or self._num_seats <= 0 or self._num_shares <= 0
        return is_full or bool(self._preempted)

    def go_on(self, request: RequestView, limit: int | None = None) -> None:
        """Gives a running request its next tokens, as many as there is room for.

        Where blocks are short, requests that were admitted last lose theirs; in the end the
        request itself.

        Args:
            request: that runs.
            limit: of its tokens in this step.
        """
        num_tokens = min(request.num_left, self.num_tokens, limit or request.num_left)
        if request.is_busy or request.id in self._preempted:
            return
        if num_tokens == 0 or self._num_shares == 0:
            return
        num_blocks = self._missing(request, request.num_computed + num_tokens)
        while num_blocks > self._num_free:
            _, victim = self._victims.popitem()
            self._preempt(victim)
            if victim.id == request.id:
                return
        self._victims.pop(request.id, None)
        self._num_promised -= num_blocks
        self._give(request, num_tokens, num_blocks)

    def go_on_all(self) -> None:
        """Gives all running requests their next tokens: answers first, then prompts."""
        for is_answer in (True, False):
            for request in self._view.running:
                if request.is_decoding == is_answer:
                    self.go_on(request)

    def admit(self, request: RequestView, limit: int | None = None) -> bool:
        """Gives a waiting request its first tokens if all of it finds room by and by.

        Args:
            request: that waits.
            limit: of its tokens in this step.

        Returns:
            Whether it is admitted.
        """
        if self.is_closed:
            return False
        num_whole = self._blocks_to_come(request)
        if num_whole + self._num_promised > self._num_free - request.num_freed:
            return False
        num_tokens = min(request.num_left, self.num_tokens, limit or request.num_left)
        num_blocks = self._missing(request, request.num_computed + num_tokens)
        self._num_free -= request.num_freed
        self._num_seats -= 1
        self._num_promised += num_whole - num_blocks
        self._computing.add(request.id)
        self._give(request, num_tokens, num_blocks)
        return True

    def admit_all(self, *, whole: bool = False, passing: bool = True) -> None:
        """Admits those that wait, in order, until one finds no room.

        One whose next block is being computed by another waits until it finds it. It does not wait
        for ever: whom it follows runs, and ends; and whoever passes it meanwhile came to run once.

        Args:
            whole: whether a prompt is cut only where the step holds no other.
            passing: whether those behind one that waits for another's block may pass it: as many
                are looked at as may run.
        """
        num_held_back = 0
        if self.is_closed:  # those who wait are seen at a cost
            return
        for request in self._view.waiting:
            would_be_cut = whole and self._has_prompt and request.num_left > self.num_tokens
            if request.follows in self._computing:
                num_held_back += 1
                if not passing or num_held_back > self._budget.max_sequences:
                    return
            elif would_be_cut or not self.admit(request) or self.is_closed:
                return

    def plan(self) -> StepPlan:
        """The step."""
        return StepPlan(tuple(self._shares), tuple(self._preempted))

    def _give(self, request: RequestView, num_tokens: int, num_blocks: int) -> None:
        self._shares.append(Share(request.id, num_tokens))
        self._has_prompt = self._has_prompt or not request.is_decoding
        self.num_tokens -= num_tokens
        self._num_shares -= 1
        self._num_free -= num_blocks

    def _preempt(self, victim: RequestView) -> None:
        self._preempted[victim.id] = None
        self._num_free += victim.num_freed
        self._num_promised -= self._blocks_to_come(victim)

    def _blocks_to_come(self, request: RequestView) -> int:
        """Blocks that are spoken for: for tokens that exist, or for all that there may be."""
        return self._missing(request, request.max_total if self._to_end else request.num_total)

    def _missing(self, request: RequestView, num_tokens: int) -> int:
        """Blocks beyond a request's own for so many tokens."""
        num_tokens += self._view.num_virtual
        return max(0, -(-num_tokens // self._view.block_size) - request.num_blocks)
