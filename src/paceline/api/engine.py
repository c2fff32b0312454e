"""``paceline.Engine``: answers from a model, without a server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack, cast

from paceline.models.chat import render_chat
from paceline.models.tokenizer import Tokenizer
from paceline.plan.plan import Plan
from paceline.serve.api.schema import random_seed
from paceline.serve.engine import Answer
from paceline.serve.load import load_engine
from paceline.serve.options import Options, overridden, require_in_range

Prompt = str | Sequence[int]


class GenerateOptions(TypedDict, total=False):
    """How prompts are answered.

    Attributes:
        max_tokens: longest answer; 128 unless given.
        min_tokens: shortest one.
        temperature: 0, unless given, takes the most likely token.
        top_p: the most likely tokens are kept up to this probability.
        top_k: this many of the most likely tokens are kept; 0 for all.
        min_p: tokens less likely than this share of the likeliest one are dropped.
        presence_penalty: taken off the logit of each token that the answer holds.
        frequency_penalty: taken off it as many times as the answer holds the token.
        repetition_penalty: divides logits of tokens of the prompt and the answer.
        logit_bias: token to what is added to its logit.
        seed: of the sampling; random unless given.
        stop: texts that end an answer and are left out of it.
        stop_token_ids: tokens that end an answer beside the model's own.
        ignore_eos: whether tokens that end an answer are tokens like any other.
        logprobs: tell log-probabilities, and those of this many likeliest tokens.
        prompt_logprobs: the same for the prompt.
        json_schema: what an answer's JSON satisfies.
        regex: what matches a whole answer.
        json_object: whether an answer is a JSON object.
        adapter: name of the plan's ``[serve.adapters]`` that answers; empty for none.
    """

    max_tokens: int
    min_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logit_bias: Mapping[int, float]
    seed: int | None
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    logprobs: int | None
    prompt_logprobs: int | None
    json_schema: Mapping[str, Any] | str
    regex: str
    json_object: bool
    adapter: str


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
        self, prompts: Prompt | Sequence[Prompt], **options: Unpack[GenerateOptions]
    ) -> list[Answer]:
        """Continues prompts; an answer does not depend on what else is in the list.

        Args:
            prompts: a text, a list of token ids, or a list of such.
            options: how; `GenerateOptions` lists them.

        Returns:
            One answer a prompt, each with `text`, `token_ids` and `finish_reason`, and with
            `logprobs` and `prompt_logprobs` where these are asked for.

        Raises:
            UsageError: an option that there is not, or a value out of range.
            RequestError: a prompt that the model cannot answer; none has been begun.
        """
        asked = _read_options(options)
        return self._engine.generate(
            asked.request(self._ids(prompt)) for prompt in _as_list(prompts)
        )

    def chat(
        self, messages: Sequence[Mapping[str, Any]], **options: Unpack[GenerateOptions]
    ) -> Answer:
        """Answers a conversation, through the model's chat template.

        Args:
            messages: each with ``role`` and ``content``, the last one the user's.
            options: as in `generate`.
        """
        prompt = render_chat(self.tokenizer, messages)
        ids = self.tokenizer.encode(prompt, add_special_tokens=False)
        return self.generate(ids, **options)[0]

    def _ids(self, prompt: Prompt) -> Sequence[int]:
        return self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    is_one = bool(prompts) and all(isinstance(item, int) for item in prompts)
    return [cast("Prompt", prompts)] if is_one else cast("list[Prompt]", list(prompts))


def _read_options(options: Mapping[str, Any]) -> Options:
    """What is asked, checked; a seed is random unless given."""
    asked: dict[str, Any] = {
        name: list(x) if isinstance(x, tuple) else x for name, x in options.items()
    }
    if (seed := asked.pop("seed", None)) is None:
        seed = random_seed()
    if isinstance(biases := asked.get("logit_bias"), Mapping):
        asked["logit_bias"] = dict(biases)
    found = overridden(Options(seed=seed), asked)
    require_in_range(found)
    return found
