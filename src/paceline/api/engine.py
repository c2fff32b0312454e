"""``paceline.Engine``: answers from a model, without a server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from paceline.core.errors import UsageError
from paceline.decode.sampler import SamplingParams
from paceline.models.chat import render_chat
from paceline.models.tokenizer import Tokenizer
from paceline.plan.plan import Plan
from paceline.serve.api.schema import random_seed
from paceline.serve.engine import Answer
from paceline.serve.load import load_engine
from paceline.serve.request import Request

Prompt = str | Sequence[int]


class Engine:
    """Answers prompts with a model that is loaded once.

    Args:
        model: a MODEL.
        plan: of which ``[serve]`` is used.
        device: auto, cpu or cuda.

    Raises:
        ConfigError: the plan cannot be served.
        UsageError: no such model or device.
    """

    def __init__(
        self, model: str | Path, plan: Plan | None = None, *, device: str = "auto"
    ) -> None:
        self._engine = load_engine(str(model), plan, device=device)

    @property
    def tokenizer(self) -> Tokenizer:
        return self._engine.tokenizer

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        max_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        adapter: str = "",
    ) -> list[Answer]:
        """Continues prompts; an answer does not depend on what else is in the list.

        Args:
            prompts: a text, a list of token ids, or a list of such.
            max_tokens: longest answer.
            temperature: 0 takes the most likely token.
            top_p: the most likely tokens are kept up to this probability.
            top_k: this many of the most likely tokens are kept; 0 for all.
            seed: of the sampling; random unless given.
            stop: texts that end an answer and are left out of it.
            adapter: name of the plan's ``[serve.adapters]`` that answers; empty for none.

        Returns:
            One answer a prompt, each with `text`, `token_ids` and `finish_reason`.

        Raises:
            UsageError: a sampling parameter out of range.
            RequestError: a prompt that the model cannot answer; none has been begun.
        """
        sampling = _sampling(temperature, top_p, top_k, seed)
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        return self._engine.generate(
            Request(
                prompt_ids=tuple(self._ids(prompt)),
                sampling=sampling,
                max_tokens=max_tokens,
                stop=stops,
                adapter=adapter,
            )
            for prompt in _as_list(prompts)
        )

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        max_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        adapter: str = "",
    ) -> Answer:
        """Answers a conversation, through the model's chat template.

        Args:
            messages: each with ``role`` and ``content``, the last one the user's.

        The rest is as in `generate`.
        """
        prompt = render_chat(self.tokenizer, messages)
        ids = self.tokenizer.encode(prompt, add_special_tokens=False)
        return self.generate(
            ids,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
            stop=stop,
            adapter=adapter,
        )[0]

    def _ids(self, prompt: Prompt) -> Sequence[int]:
        return self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    is_one = bool(prompts) and all(isinstance(item, int) for item in prompts)
    return [cast("Prompt", prompts)] if is_one else cast("list[Prompt]", list(prompts))


def _sampling(temperature: float, top_p: float, top_k: int, seed: int | None) -> SamplingParams:
    rules = {
        f"temperature = {temperature}: must not be negative": temperature >= 0,
        f"top_p = {top_p}: must be above 0 and at most 1": 0 < top_p <= 1,
        f"top_k = {top_k}: must not be negative": top_k >= 0,
    }
    if broken := [rule for rule, holds in rules.items() if not holds]:
        raise UsageError("; ".join(broken))
    return SamplingParams(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=random_seed() if seed is None else seed,
    )
