"""The training loop."""

from __future__ import annotations

import sys
from contextlib import closing
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch

import paceline
from paceline.checkpoint import SAVERS
from paceline.checkpoint.base import SavedRun, Saver, Told
from paceline.checkpoint.interval import Interval
from paceline.checkpoint.load import load
from paceline.checkpoint.manifest import read_manifest
from paceline.core.clock import Clock, WallClock
from paceline.core.record import RecordWriter
from paceline.dist.world import World
from paceline.kernels.device import (
    choose_dtype,
    describe,
    measure_peak_flops,
    peak_memory_bytes,
    synchronize,
)
from paceline.models.hub import ModelSource
from paceline.optim import OPTIMIZERS
from paceline.optim.schedule import learning_rate
from paceline.parallel.apply import apply
from paceline.plan.plan import Plan
from paceline.train.evaluate import evaluate
from paceline.train.inputs import open_inputs, require_same_model
from paceline.train.objective.base import Objective
from paceline.train.objective.next_token import next_token
from paceline.train.progress import progress_of, require_same_order
from paceline.train.records import EvalRecord, RunRecord, StepRecord
from paceline.train.run import RunConfig, RunFolder
from paceline.train.state import State
from paceline.train.step import StepResult, train_step


class Trainer:
    """Trains a model as a plan says; every rank makes one.

    Args:
        source: the model.
        config: what is trained on, and for how long.
        plan: how; it has been checked.
        world: the ranks.
        folder: the run's folder.
        objective: what is trained for.
        clock: what time is read from.
    """

    def __init__(
        self,
        source: ModelSource,
        config: RunConfig,
        plan: Plan,
        world: World,
        folder: RunFolder,
        *,
        objective: Objective = next_token,
        clock: Clock | None = None,
    ) -> None:
        inputs = open_inputs(config, plan, source)
        self.config, self.loader, self.held_out = inputs.config, inputs.loader, inputs.held_out
        self.source, self.plan = source, plan
        self.world, self.folder = world, folder
        self.objective = objective
        self.clock = clock or WallClock()
        model = apply(source.spec, source.weights, plan, world)
        optimizer = OPTIMIZERS.load(plan.optimizer.name)(model.parameters(), plan.optimizer)
        self.state = State(model, optimizer)
        self.evaluation: EvalRecord | None = None
        self._peak_flops = 0.0

    def restore(self, checkpoint: Path) -> None:
        """Takes up the state that a checkpoint holds.

        Raises:
            UsageError: it holds additions to a model whose weights are others now, or it has read
                its data in another order.
            DataError: it is damaged, or another run's.
        """
        if self.state.model.added:
            require_same_model(self.config, self.source)
        progress = read_manifest(checkpoint).progress
        require_same_order(checkpoint, progress, self.plan, self.config)
        manifest = load(checkpoint, self.state.parts(), self.world)
        self.state.model.finish_update()
        self.state.step = manifest.step

    def run(self) -> StepRecord | None:
        """Takes the steps that are left and returns the last one's record."""
        record = None
        with (
            closing(RecordWriter(self.folder.records(self.world.rank))) as self._records,
            closing(self._open_saver()) as saver,
        ):
            self._begin()
            self._evaluate_if_due()
            self._interval = Interval(self.plan.checkpoint, self.world, self.state.step)
            self.world.begin_training()
            while self.state.step < self.config.steps:
                start_s = self.clock.now_s()
                step = self.state.step + 1
                rate = learning_rate(self.plan.optimizer, step, self.config.steps)
                is_saved = self._interval.is_due(step) or step == self.config.steps
                result = train_step(
                    self.state,
                    self.loader.microbatches(step, self.world.data_index),
                    self.objective,
                    self.world,
                    learning_rate=rate,
                    max_norm=self.plan.optimizer.clip_norm,
                    before_update=partial(saver.fence, is_due=is_saved),
                )
                synchronize(self.world.device)
                self.world.finish_step(self.state.step)
                record = self._observe(result, rate, self.clock.now_s() - start_s)
                self._interval.note_step(record.time_s)
                self._tell(saver.poll())
                if is_saved:
                    self._save(saver)
                self._evaluate_if_due()
            with self.world.phase("saving"):
                self._tell(saver.finish())
        return record

    def _begin(self) -> None:
        """Measures the device and writes down what the run is."""
        dtype = choose_dtype(self.plan.precision.compute, self.world.device)
        self._peak_flops = measure_peak_flops(self.world.device, dtype)
        self._records.write(
            RunRecord(
                model=self.config.model,
                first_step=self.state.step + 1,
                num_steps=self.config.steps,
                num_ranks=self.world.mesh.num_ranks,
                device=describe(self.world.device),
                peak_flops=self._peak_flops,
                paceline=paceline.__version__,
                torch=torch.__version__,
            )
        )
        self._say(
            f"{self.config.model}, {self.source.spec.num_parameters / 1e6:,.1f} M parameters, on "
            f"{' and '.join(self.config.sources)}: "
            f"steps {self.state.step + 1} to {self.config.steps}, "
            f"{self.world.mesh.num_ranks} rank(s) of at best {self._peak_flops / 1e9:,.0f} GFLOP/s"
        )

    def _observe(self, result: StepResult, rate: float, time_s: float) -> StepRecord:
        tokens = self.plan.train.tokens_per_step
        flops = tokens * self.source.spec.model_flops_per_token(
            self.plan.train.sequence_length, trains_weights=not self.state.model.added
        )
        flops_per_s = flops / self.world.mesh.num_ranks / time_s
        record = StepRecord(
            step=self.state.step,
            loss=result.loss,
            grad_norm=result.grad_norm,
            clip_factor=result.clip_factor,
            learning_rate=rate,
            tokens=tokens,
            valid_tokens=result.valid_tokens,
            tokens_per_s=tokens / time_s,
            time_s=time_s,
            peak_share=flops_per_s / self._peak_flops,
            memory_bytes=peak_memory_bytes(self.world.device),
            statistics=self.state.model.statistics(),
        )
        self._records.write(record)
        self._say(log_line(record, self.config.steps))
        return record

    def _open_saver(self) -> Saver:
        spec = self.source.spec
        run = SavedRun(self.folder.path, self.plan, spec, self.world, self.state.declared(spec))
        return SAVERS.load(self.plan.checkpoint.method)(run, self.state.parts())

    def _save(self, saver: Saver) -> None:
        """Begins to save the state."""
        step, optimizer = self.state.step, self.state.optimizer
        progress = progress_of(step, self.plan, self.config, optimizer)
        with self.world.phase("saving"):
            self._interval.begin(step)
            saver.begin(step, self.state.parts(), progress)

    def _tell(self, saves: list[Told]) -> None:
        """Writes down what has become of saves."""
        self._interval.note_saves(saves)
        for record in saves:
            self._records.write(record)
            self._say(str(record))

    def _evaluate_if_due(self) -> None:
        step = self.state.step
        is_due = step % self.plan.train.eval_interval_steps == 0 or step == self.config.steps
        if self.held_out is None or not is_due:
            return
        start_s = self.clock.now_s()
        batches = self.held_out.batches(self.world.data_index)
        with self.world.phase("evaluating"):
            result = evaluate(
                self.state.model,
                batches,
                self.objective,
                self.world,
                num_microbatches=self.plan.mesh.pp,
            )
        self.evaluation = EvalRecord(
            step=step,
            loss=result.loss,
            perplexity=result.perplexity,
            tokens=result.tokens,
            time_s=self.clock.now_s() - start_s,
        )
        self._records.write(self.evaluation)
        self._say(
            f"held out, after step {step}: loss {result.loss:.4f}  "
            f"perplexity {result.perplexity:,.2f}  {result.tokens:,} tokens"
        )

    def _say(self, line: str) -> None:
        """Tells the person at the terminal, once for all ranks."""
        if self.world.is_first:
            print(line, file=sys.stderr, flush=True)  # noqa: T201


def log_line(record: StepRecord, num_steps: int) -> str:
    """A step as a person reads it."""
    left = timedelta(seconds=round((num_steps - record.step) * record.time_s))
    counted = "".join(
        f"{name.replace('_', ' ')} {value:.3f}  " for name, value in record.statistics.items()
    )
    return (
        f"step {record.step}/{num_steps}  loss {record.loss:.4f}  norm {record.grad_norm:.3f}  "
        f"{counted}"
        f"{record.tokens_per_s:,.0f} tokens/s  {record.peak_share:.0%} of peak  "
        f"{record.memory_bytes / 2**30:.2f} GiB  eta {left}"
    )
