"""What is wrong with a run, and with which of its ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal[
    "crash", "hang", "transport", "straggler", "slow-sender", "slow-receiver", "slow-link"
]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is wrong with a run.

    Attributes:
        kind: ``crash``: a rank has ended; ``hang``: it never came to a collective that others wait
            in; ``transport``: all came and none leaves; ``straggler``: it comes late, again and
            again; the others: what it sends, receives, or what goes over one link is slow.
        ranks: whose fault it is; of a link the sender, then the receiver.
        evidence: the figures that say so, in words.
    """

    kind: Kind
    ranks: tuple[int, ...]
    evidence: str
