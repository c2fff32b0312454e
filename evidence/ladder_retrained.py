"""Proof: a model converted to a ladder residual regains what the conversion costs it, by training.

SmolLM2's upper half is converted, and the whole model trained on most files of Python's standard
library for a few steps, less than two cores take in twenty minutes. Its loss on files that are
held out must come back at least half the way to the plain model's. The plain model was not trained
on this text, and some of what comes back may be knowledge of it: so the same is told of prose about
Python, of which training sees none. Interrupted, the proof goes on from the last checkpoint.
"""

from __future__ import annotations

import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from paceline import Trainer
from paceline.checkpoint.export import export
from paceline.checkpoint.manifest import complete_checkpoints, read_manifest
from paceline.core.errors import PacelineError
from paceline.core.files import new_folder
from paceline.core.record import Record, RecordWriter, read_records
from paceline.data.sources import source_files
from paceline.dist.world import World
from paceline.models.convert import convert
from paceline.models.hub import resolve
from paceline.parallel.apply import apply
from paceline.plan.plan import (
    CheckpointConfig,
    OptimizerConfig,
    Plan,
    ScheduleConfig,
    TrainConfig,
)
from paceline.train.evaluate import evaluate
from paceline.train.inputs import open_inputs
from paceline.train.objective.next_token import next_token
from paceline.train.run import RunConfig, RunFolder

ROOT = Path(__file__).parent.parent
MODEL = "smollm2-135m"
NUM_STEPS = 60
LEAST_REGAINED = 0.5
TRAIN, HELD_OUT, PROSE = "train", "held-out", "prose"
_SESSIONS = "sessions.jsonl"
_HELD_OUT_EVERY = 25
_PROSE_FILE = "topics.py"  # the language reference, as `help` prints it
_RATE = 3e-4


@dataclass(frozen=True, kw_only=True, slots=True)
class SessionRecord(Record):
    """Training has gone on to its end; a part that was broken off leaves none.

    Attributes:
        core_s: seconds of a core that it took.
    """

    kind: ClassVar[str] = "session"
    core_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class RetrainedRecord(Record):
    """A converted model has been trained.

    Attributes:
        model: that was converted.
        text: held-out or prose, of which the losses are.
        plain_loss: of the model before.
        converted_loss: of the converted one before any step.
        retrained_loss: after the last step.
        regained: of what the conversion has cost, the share that came back.
        steps: that were taken.
        tokens: that they read.
        core_s: seconds of a core that training took, loading and evaluations included.
    """

    kind: ClassVar[str] = "retrained"
    model: str
    text: str
    plain_loss: float
    converted_loss: float
    retrained_loss: float
    regained: float
    steps: int
    tokens: int
    core_s: float


def plan_of(num_steps: int) -> Plan:
    """One rank, short sequences, the usual optimizer with a warm-up and a decay."""
    return Plan(
        train=TrainConfig(
            sequence_length=256,
            tokens_per_step=1024,
            microbatch_tokens=1024,
            eval_interval_steps=max(1, num_steps // 4),
            eval_tokens=8192,
        ),
        optimizer=OptimizerConfig(
            lr=_RATE,
            schedule=ScheduleConfig(kind="cosine", warmup_steps=num_steps // 20),
        ),
        checkpoint=CheckpointConfig(interval_steps=max(1, num_steps // 4), keep=1),
    )


def prove(folder: Path, *, model: str = MODEL, num_steps: int = NUM_STEPS) -> list[dict[str, Any]]:
    """Converts, trains and compares; leaves a record for each text. What is done is not done anew.

    Raises:
        PacelineError: less came back than must.
    """
    converted, retrained, text = folder / "converted", folder / "retrained", folder / "text"
    split_text(text)
    if not converted.exists():
        convert(resolve(model), "ladder", "upper-half", converted)
    run = folder / "run"
    if not retrained.exists():
        start_s = time.process_time()
        train(str(converted), text, run, num_steps)
        sessions = RecordWriter(folder / _SESSIONS)
        sessions.write(SessionRecord(core_s=time.process_time() - start_s))
        sessions.close()
        newest = complete_checkpoints(run / "checkpoints")[-1]
        export(newest, RunFolder(run).model_files(), retrained)
    path, plan = folder / "retrained.jsonl", plan_of(num_steps)
    known = list(read_records(path)) if path.exists() else []
    writer = RecordWriter(path)
    for part in (HELD_OUT, PROSE)[len(known) :]:
        losses = [loss_on(text / part, str(m), plan) for m in (model, converted, retrained)]
        plain_loss, converted_loss, retrained_loss = losses
        found = RetrainedRecord(
            model=model,
            text=part,
            plain_loss=plain_loss,
            converted_loss=converted_loss,
            retrained_loss=retrained_loss,
            regained=(converted_loss - retrained_loss) / (converted_loss - plain_loss),
            steps=num_steps,
            tokens=num_steps * plan.train.tokens_per_step,
            core_s=sum(record["core_s"] for record in read_records(folder / _SESSIONS)),
        )
        writer.write(found)
    writer.close()
    records = list(read_records(path))
    if (regained := records[0]["regained"]) < LEAST_REGAINED:
        raise PacelineError(f"{regained:.0%} came back, of at least {LEAST_REGAINED:.0%}")
    return records


def split_text(folder: Path) -> None:
    """The standard library in three folders: to train on, held out, and prose that is held out."""
    if folder.exists():
        return
    with new_folder(folder) as temporary:
        for part in (TRAIN, HELD_OUT, PROSE):
            (temporary / part).mkdir()
        for number, file in enumerate(source_files("builtin:python-stdlib")):
            part = TRAIN if number % _HELD_OUT_EVERY else HELD_OUT
            part = PROSE if file.name == _PROSE_FILE else part
            shutil.copyfile(file, temporary / part / f"{number:04}-{file.name}")


def train(model: str, text: Path, run: Path, num_steps: int) -> None:
    """Takes the steps that are left."""
    if saved := complete_checkpoints(run / "checkpoints"):
        if read_manifest(saved[-1]).step < num_steps:
            Trainer.resume(run).run()
        return
    shutil.rmtree(run, ignore_errors=True)
    Trainer(
        model,
        data=text / TRAIN,
        eval_data=text / HELD_OUT,
        out=run,
        plan=plan_of(num_steps),
        steps=num_steps,
    ).run()


def loss_on(text: Path, model: str, plan: Plan) -> float:
    """The loss of a model on a text, the same rows for every model."""
    source, world = resolve(model), World(plan.mesh, 0, torch.device("cpu"))
    config = RunConfig(model=model, data=str(text), steps=1, eval_data=str(text))
    held_out = open_inputs(config, plan, source).held_out
    assert held_out is not None
    parallel = apply(source.spec, source.weights, plan, world)
    return evaluate(parallel, held_out.batches(0), next_token, world).loss


def main() -> None:
    for record in prove(ROOT / "evidence" / "records" / "ladder"):
        losses = [record[f"{name}_loss"] for name in ("plain", "converted", "retrained")]
        print(f"{record['text']}: {losses}, {record['regained']:.0%} came back", file=sys.stderr)


if __name__ == "__main__":
    main()
