"""What a body asks for, in the engine's terms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from paceline.serve.api.tools import ToolUse
from paceline.serve.request import Request


@dataclass(frozen=True, slots=True)
class Asked:
    """What a body comes to: prompts, and how each is answered.

    Attributes:
        requests: one a prompt, for the first of its choices.
        num_choices: of each prompt.
        echoes: the texts that the answers to each prompt begin with.
        is_silent: whether only the prompt is asked for: the answer's one token is not told.
        tools: what the answers make of tools.
    """

    requests: Sequence[Request]
    num_choices: int
    echoes: Sequence[str]
    is_silent: bool = False
    tools: ToolUse = field(default_factory=ToolUse)

    def each(self) -> list[tuple[Request, str]]:
        """Each choice's request and the text that it begins with, in the order of the choices.

        The choices of a prompt differ by their stream of noise alone.
        """
        return [
            (replace(request, sampling=replace(request.sampling, stream=stream)), echo)
            for request, echo in zip(self.requests, self.echoes, strict=True)
            for stream in range(self.num_choices)
        ]

    def of(self, *, tenant: str, timeout_s: float, adapter: str) -> Asked:
        """The same, asked by somebody of the model or of one of its adapters."""
        whose = {"tenant": tenant, "timeout_s": timeout_s, "adapter": adapter}
        return replace(self, requests=[replace(one, **whose) for one in self.requests])
