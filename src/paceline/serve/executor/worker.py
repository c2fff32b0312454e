"""A rank of an engine: computes its part of every step that the controller sends.

Source: Du et al., EnergonAI, arXiv:2209.02341 (hierarchy-controller architecture: one controller
    decides, its workers talk to each other of themselves; non-blocking pipeline parallelism).
"""

from __future__ import annotations

import socket
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed
from torch import Tensor

from paceline.core.errors import DataError
from paceline.decode.grammar import Grammars
from paceline.decode.paged import Packed, PagedPass, PagedStore, logits_of, pack
from paceline.decode.sampler import Sampler
from paceline.dist.failure import is_peer_gone
from paceline.dist.launch import end_with_parent
from paceline.dist.p2p import PointToPoint
from paceline.dist.world import World
from paceline.kernels.device import choose_device, choose_dtype
from paceline.models.adapters import adapt, resolve_adapted
from paceline.models.vocabulary import Output
from paceline.models.weights import build
from paceline.parallel.inference import load_part
from paceline.parallel.pipeline.stages import StageModel
from paceline.plan.mesh import MeshConfig
from paceline.serve.executor.base import StepResult, Work
from paceline.serve.executor.chosen import chosen, rows_wanted
from paceline.serve.executor.draws import DrawListener
from paceline.serve.executor.messages import FROM_RANKS, TO_RANKS, Begin, Done, Job, Ready, Step
from paceline.serve.executor.tables import Tables
from paceline.serve.executor.wire import Line

LOST_PEER = 70
"""Exit code of a rank that has failed because another is gone."""
ACTIVATIONS = "activations"
_TIMEOUT = timedelta(days=1)  # the controller judges how long a step may take


def main(descriptor: int, controller: int) -> None:
    """Runs a rank until its controller is gone.

    Args:
        descriptor: of the connection to the controller.
        controller: its process id.
    """
    end_with_parent(controller)
    connection = socket.socket(fileno=descriptor)
    try:
        serve(Line(connection, heard=TO_RANKS, told=FROM_RANKS))
    except Exception as error:
        if not is_peer_gone(error):
            raise
        sys.stderr.write(f"lost another rank: {error}\n")
        # The group is left as it is: taking it down could wait for ranks that are stuck.
        sys.exit(LOST_PEER)


def serve(line: Line) -> None:
    """Computes what comes over a line, until its other end is closed."""
    begin = line.receive()
    if not isinstance(begin, Begin):
        raise DataError("the first message says what there is to compute")
    torch.set_num_threads(begin.job.num_threads)
    worker = Worker(begin.job, _join(begin))
    line.send(Ready())
    while True:
        try:
            step = line.receive()
        except EOFError:
            return
        line.send(worker.run(step))


def _join(begin: Begin) -> World:
    """Meets the other ranks."""
    job = begin.job
    mesh = MeshConfig(pp=job.pp, tp=job.tp)
    device = choose_device(job.device, local_rank=begin.rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.distributed.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=f"file://{begin.store}",
        rank=begin.rank,
        world_size=mesh.num_ranks,
        timeout=_TIMEOUT,
    )
    return World(mesh, begin.rank, device)


class Worker:
    """One rank: its stage of the model, cut over tensor ranks, and the blocks of its heads.

    Args:
        job: of all ranks.
        world: the ranks.
    """

    def __init__(self, job: Job, world: World) -> None:
        self._world = world
        source = resolve_adapted(job.model, Path(job.adapter) if job.adapter else None)
        if source.identity != job.identity:
            raise DataError(f"the weights of {job.model} are not those that the controller found")
        self._dtype = choose_dtype(job.dtype, world.device)
        weights = adapt(build(source.spec), source)
        self._part = load_part(source.spec, weights, world, self._dtype)
        self._store = PagedStore(
            self._part.store_spec, job.num_blocks, job.block_size, self._dtype, world.device
        )
        self._tables, self._draws = Tables(job.block_size), DrawListener()
        self._sampler = Sampler(Grammars(source.tokenizer, source.spec.vocab_size))
        self._stage = world.coordinate("pp")
        self._way = PointToPoint(world, "pp", (ACTIVATIONS,))
        world.barrier()

    @torch.inference_mode()
    def run(self, step: Step) -> Done:
        """Computes this rank's part of a step, and hands it on to the next stage."""
        for request_id in step.released:
            self._forget(request_id)
        if not step.works:
            return self._done(step, 0, time.monotonic(), StepResult({}))
        packed = pack([self._tables.extend(work) for work in step.works], self._world.device)
        given = self._given(packed)
        begin_s = time.monotonic()
        output = self._computed(packed, given, step.works)
        result = self._chosen(output, step.works) if self._chooses else None
        done = self._done(step, packed.tokens_1T.shape[1], begin_s, result)
        if not self._part.is_last:
            self._way.send(output, self._stage + 1, ACTIVATIONS)
        return done

    def _forget(self, request_id: int) -> None:
        self._tables.release(request_id)
        self._draws.forget(request_id)
        self._sampler.forget(request_id)

    @property
    def _chooses(self) -> bool:
        return self._part.is_last and self._world.coordinate("tp") == 0

    def _done(self, step: Step, num_rows: int, begin_s: float, result: StepResult | None) -> Done:
        return Done(
            number=step.number,
            num_rows=num_rows,
            begin_s=begin_s,
            end_s=time.monotonic(),
            result=result if self._chooses else None,
        )

    def _given(self, packed: Packed) -> Tensor | None:
        """What the stage before has made of the tokens; None in the first."""
        if self._part.is_first:
            return None
        shape = (*packed.tokens_1T.shape, self._part.decoder.spec.d_model)
        return self._way.receive(shape, self._dtype, self._stage - 1, ACTIVATIONS).wait()

    def _computed(self, packed: Packed, given: Tensor | None, works: tuple[Work, ...]) -> Tensor:
        """Hidden states (1, T, D), or in the last stage logits (1, R, V) of what is wanted."""
        part = self._part
        part.decoder.attend = PagedPass(self._store, packed.rows).attend
        if isinstance(part.stage, StageModel):
            part.stage.given = given
        wanted = rows_wanted(works)
        head = logits_of(wanted) if wanted else _no_logits
        return part.stage(packed.tokens_1T, packed.layout, head=head)

    def _chosen(self, logits_1RV: Tensor, works: tuple[Work, ...]) -> StepResult:
        return chosen(logits_1RV[0], [self._draws.whole(work) for work in works], self._sampler)


def _no_logits(x_BTD: Tensor, output: Output) -> Tensor:
    """The head of a step of which no logits are wanted."""
    del output
    return x_BTD[:, :0]
