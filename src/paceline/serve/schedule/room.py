"""What is left of a step's budget and of the blocks while a policy plans the step."""

from __future__ import annotations

from paceline.serve.schedule.base import Budget, RequestView, Share, StepPlan, View


class Room:
    """A step in the making.

    Args:
        view: that it is planned for.
        budget: that it must keep.

    Attributes:
        num_tokens: that the step can still compute.
    """

    def __init__(self, view: View, budget: Budget) -> None:
        self.num_tokens = budget.max_batch_tokens
        self._view = view
        self._num_free = view.num_free
        self._victims = [r for r in view.running if not r.is_busy]  # the last of them goes first
        self._num_seats = budget.max_sequences - len(view.running)
        self._num_shares = budget.max_sequences if budget.max_shares is None else budget.max_shares
        # Of prompts that are being computed: blocks for the rest of each are spoken for.
        self._num_promised = sum(self._blocks_to_come(r) for r in view.running)
        self._shares: list[Share] = []
        self._preempted: list[int] = []

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
            victim = self._victims.pop()
            self._preempt(victim)
            if victim.id == request.id:
                return
        if request in self._victims:
            self._victims.remove(request)
        self._num_promised -= num_blocks
        self._give(request, num_tokens, num_blocks)

    def admit(self, request: RequestView, limit: int | None = None) -> bool:
        """Gives a waiting request its first tokens if all that exist of it find room by and by.

        Nothing is admitted in a step that has preempted: what was taken away comes first.

        Args:
            request: that waits.
            limit: of its tokens in this step.

        Returns:
            Whether it is admitted.
        """
        num_tokens = min(request.num_left, self.num_tokens, limit or request.num_left)
        if num_tokens == 0 or self._num_seats == 0 or self._num_shares == 0 or self._preempted:
            return False
        self._num_free -= request.num_freed
        num_whole = self._blocks_to_come(request)
        if num_whole + self._num_promised > self._num_free:
            self._num_free += request.num_freed
            return False
        num_blocks = self._missing(request, request.num_computed + num_tokens)
        self._num_seats -= 1
        self._num_promised += num_whole - num_blocks
        self._give(request, num_tokens, num_blocks)
        return True

    def plan(self) -> StepPlan:
        """The step."""
        return StepPlan(tuple(self._shares), tuple(self._preempted))

    def _give(self, request: RequestView, num_tokens: int, num_blocks: int) -> None:
        self._shares.append(Share(request.id, num_tokens))
        self.num_tokens -= num_tokens
        self._num_shares -= 1
        self._num_free -= num_blocks

    def _preempt(self, victim: RequestView) -> None:
        self._preempted.append(victim.id)
        self._num_free += victim.num_freed
        self._num_promised -= self._blocks_to_come(victim)

    def _blocks_to_come(self, request: RequestView) -> int:
        """Blocks for the tokens that exist and are not computed."""
        return self._missing(request, request.num_total)

    def _missing(self, request: RequestView, num_tokens: int) -> int:
        """Blocks beyond a request's own for so many tokens."""
        num_tokens += self._view.num_virtual
        return max(0, -(-num_tokens // self._view.block_size) - request.num_blocks)
