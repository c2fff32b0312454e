"""Starting ranks: torchrun's agent on this machine, unless a launcher has started us already."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Generator, Sequence
from contextlib import contextmanager

from paceline.core.env import rank_environment
from paceline.plan.mesh import MeshConfig

_POLL_S = 0.5
_WATCH = "end-with-parent"
_AGENT_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
_is_spoken_for = False
# A launcher may be gone before its rank first looks for it: the rank is told whom to look for.
_RANK = """
from paceline.dist.launch import follow_launcher
follow_launcher({launcher})
from paceline.cli.main import main
main()
"""


def launch_ranks(mesh: MeshConfig, arguments: Sequence[str]) -> None:
    """Runs ``paceline ARGUMENTS`` on the ranks of a mesh and returns once all have succeeded.

    On several machines `torchrun --nnodes` is started by hand; then this is not called. A rank that
    has ended is noticed at once. One that hangs is noticed when those that wait for it in a
    collective give up: after torch's 30 minutes over gloo, 10 over NCCL.

    Raises:
        RankError: the first rank to fail, where it is on the mesh, and why. All ranks are gone.
        KeyboardInterrupt: the run was interrupted; the ranks are gone.
    """
    # Here, because ranks use this module before they can afford to import torch.
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from paceline.dist.failure import End, Failure, first_failure

    num_ranks = mesh.num_ranks
    sys.stdout.flush()
    sys.stderr.flush()
    num_threads = str(max(1, (os.cpu_count() or 1) // num_ranks))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_ranks,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    command = ("-u", "-c", _RANK.format(launcher=os.getpid()), *arguments)
    logging.disable(logging.ERROR)  # the agent repeats at length what ranks have said
    try:
        with _default("OMP_NUM_THREADS", num_threads), _handlers_kept():
            elastic_launch(config, sys.executable)(*command)
    except ChildFailedError as error:
        ends = {
            rank: End(failure.exitcode, Failure.read(failure.error_file_data))
            for rank, failure in error.failures.items()
        }
        raise first_failure(ends, mesh) from None  # the agent's own says no more
    except SignalException as error:
        if error.sigval == signal.SIGINT:
            raise KeyboardInterrupt from error
        sys.exit(128 + error.sigval)
    finally:
        logging.disable(logging.NOTSET)


@contextmanager
def _default(name: str, value: str) -> Generator[None]:
    """An environment variable for processes that are started, unless it is set already."""
    if name in os.environ:
        yield
        return
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]


@contextmanager
def _handlers_kept() -> Generator[None]:
    """The agent takes signals for as long as it has ranks to end, and no longer."""
    handlers = {number: signal.getsignal(number) for number in _AGENT_SIGNALS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def is_launched() -> bool:
    """Whether a launcher has started this process as a rank."""
    return rank_environment() is not None


def is_spoken_for() -> bool:
    """Whether `launch_ranks` has started this process: it tells what ends a rank."""
    return _is_spoken_for


def follow_launcher(launcher: int | None = None) -> None:
    """Ends this rank with its launcher, which speaks for it when the run is interrupted.

    Args:
        launcher: the process id of `launch_ranks`; absent: torchrun's agent, our parent.
    """
    global _is_spoken_for
    _is_spoken_for = _is_spoken_for or launcher is not None
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if not any(thread.name == _WATCH for thread in threading.enumerate()):
        end_with_parent(launcher)


def end_with_parent(parent: int | None = None) -> None:
    """Ends this process soon after its parent is gone, so that a killed run leaves no orphans.

    Args:
        parent: its process id; by default that of the parent that is there now.
    """
    expected = parent or os.getppid()

    def watch() -> None:
        while os.getppid() == expected:
            time.sleep(_POLL_S)
        os._exit(1)

    threading.Thread(target=watch, name=_WATCH, daemon=True).start()
