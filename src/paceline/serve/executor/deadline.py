"""How long a step may take before whoever computes it is taken to hang. No clock: plain numbers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Deadline:
    """Derived from the steps before: many times as long as the longest of them.

    Attributes:
        least_s: no step has less.
        first_s: that the first one has: memory is touched and kernels are built in it.
        factor: of the longest step's time.
        longest_s: of all steps after the first.
        num_tokens: that the longest had; a step with more has so much more time.
        is_first: whether no step is done yet.
    """

    least_s: float = 10.0
    first_s: float = 120.0
    factor: float = 20.0
    longest_s: float = 0.0
    num_tokens: int = 0
    is_first: bool = True

    def allowed_s(self, num_tokens: int) -> float:
        """What a step of so many tokens has."""
        if self.num_tokens == 0:
            return max(self.least_s, self.first_s)
        more = max(1.0, num_tokens / self.num_tokens)
        return max(self.least_s, self.factor * self.longest_s * more)

    def took(self, num_tokens: int, time_s: float) -> None:
        """A step is done."""
        if not self.is_first and time_s > self.longest_s:
            self.longest_s, self.num_tokens = time_s, num_tokens
        self.is_first = False
