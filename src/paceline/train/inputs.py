"""What a run reads: its data and its held-out data, tokenised, and the proof that they are as
they were when the run began.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import partial

from paceline.core.env import cache_folder
from paceline.core.errors import UsageError
from paceline.data.held_out import HeldOut
from paceline.data.loader import Loader
from paceline.data.mixture import block_counts
from paceline.data.sources import parse_source, source_files
from paceline.data.tokens import Encoding, Source, tokenize
from paceline.models.chat import render_chat
from paceline.models.hub import ModelSource
from paceline.plan.plan import Plan
from paceline.train.run import RunConfig


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a run reads.

    Attributes:
        config: the run's, with the identities of its model and data filled in.
        loader: gives the batches of steps.
        held_out: gives those of evaluations; None without held-out data.
    """

    config: RunConfig
    loader: Loader
    held_out: HeldOut | None


def require_sources(config: RunConfig) -> None:
    """Raises UsageError if data is not there or cannot be mixed so; reads none of it."""
    weighted = [parse_source(text) for text in config.sources]
    block_counts([weight for _, weight in weighted])
    held_out = [config.eval_data] if config.eval_data else []
    for source in [*(source for source, _ in weighted), *held_out]:
        source_files(source)


def open_inputs(config: RunConfig, plan: Plan, model: ModelSource) -> Inputs:
    """Tokenises what a run reads, or finds it in the cache; nothing of the run is written.

    Raises:
        UsageError: data that cannot be used so, or that has changed since the run began.
        DataError: a file whose content is broken.
    """
    end_token = _end_token(model)
    encoding = Encoding(
        encoder=model.tokenizer,
        render=partial(render_chat, model.tokenizer),
        identity=_identity(model),
        end_token=end_token,
        answers_only=plan.train.answers_only,
    )
    read = partial(tokenize, encoding=encoding, cache=cache_folder() / "tokens")
    weighted = [parse_source(text) for text in config.sources]
    sources = [read(source, weight=weight) for source, weight in weighted]
    held_out = read(config.eval_data) if config.eval_data else None
    identified = _require_same(config, [*sources, held_out] if held_out else sources)
    return Inputs(
        config=replace(identified, model_identity=config.model_identity or model.identity),
        loader=Loader(sources, plan, end_token=end_token),
        held_out=HeldOut(held_out, plan, end_token=end_token) if held_out else None,
    )


def require_same_model(config: RunConfig, model: ModelSource) -> None:
    """Raises UsageError if the model has other weights than when the run began."""
    if config.model_identity not in ("", model.identity):
        raise UsageError(
            f"{model.name} has other weights than when the run began, and the checkpoint holds "
            "only what was added to them",
            hint="put it back as it was, or start a new run",
        )


def _require_same(config: RunConfig, sources: list[Source]) -> RunConfig:
    """The config with the identities of its data, which are those that it had, if it had any."""
    found = tuple(source.identity for source in sources)
    before = config.data_identity or found
    if len(before) != len(found):
        message = f"run.toml names {len(found)} sources, but has hashes of {len(before)}"
        raise UsageError(message, hint="start a new run for other data")
    for source, began_with in zip(sources, before, strict=True):
        if source.identity != began_with:
            raise UsageError(
                f"{source.name} has changed since the run began: its tokens have the hash "
                f"{source.identity[:12]}, not {began_with[:12]}",
                hint="put it back as it was, or start a new run",
            )
    return replace(config, data_identity=found)


def _end_token(model: ModelSource) -> int:
    """What is put after every document."""
    if not model.tokenizer.eos_ids:
        hint = "name eos_token in its tokenizer_config.json"
        raise UsageError(f"{model.name}: its tokenizer has no token that ends a text", hint=hint)
    return model.tokenizer.eos_ids[0]


def _identity(model: ModelSource) -> str:
    """What tells how this model's tokenizer and chat template write documents from others'."""
    tokenizer = model.tokenizer
    rendering = [tokenizer.eos_ids, tokenizer.chat_template, tokenizer.special_tokens]
    return json.dumps([model.files["tokenizer.json"], *rendering])
