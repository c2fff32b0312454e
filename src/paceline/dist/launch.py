"""Starting ranks: torchrun's agent on this machine, unless a launcher has started us already."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Mapping, Sequence

from paceline.core.env import rank_environment
from paceline.core.errors import RankError

_POLL_S = 0.5
_WATCH = "end-with-parent"
# A launcher may be gone before its rank first looks for it: the rank is told whom to look for.
_RANK = """
from paceline.dist.launch import follow_launcher
follow_launcher({launcher})
from paceline.cli.main import main
main()
"""


def launch_ranks(num_ranks: int, arguments: Sequence[str]) -> None:
    """Runs ``paceline ARGUMENTS`` on `num_ranks` ranks and returns once all have succeeded.

    On several machines `torchrun --nnodes` is started by hand; then this is not called.

    Raises:
        SystemExit: a rank failed and has said why; with its exit code.
        RankError: a rank was killed.
        KeyboardInterrupt: the run was interrupted; the ranks are gone.
    """
    # Here, because ranks use this module before they can afford to import torch.
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    sys.stdout.flush()
    sys.stderr.flush()
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_ranks)))
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
        elastic_launch(config, sys.executable)(*command)
    except ChildFailedError as error:
        _fail_like({rank: failure.exitcode for rank, failure in error.failures.items()})
    except SignalException as error:
        if error.sigval == signal.SIGINT:
            raise KeyboardInterrupt from error
        sys.exit(128 + error.sigval)
    finally:
        logging.disable(logging.NOTSET)


def _fail_like(exit_codes: Mapping[int, int]) -> None:
    """Ends as the ranks did, of which the agent has ended those that were left, by SIGTERM."""
    killed = {rank: -code for rank, code in exit_codes.items() if code < 0}
    others = {rank: number for rank, number in killed.items() if number != signal.SIGTERM}
    if others or len(killed) == len(exit_codes):
        rank, number = next(iter((others or killed).items()))
        hint = "paceline train --resume goes on from the newest complete checkpoint"
        raise RankError(f"rank {rank} was ended by {signal.Signals(number).name}", hint=hint)
    sys.exit(max(exit_codes.values()))


def is_launched() -> bool:
    """Whether a launcher has started this process as a rank."""
    return rank_environment() is not None


def follow_launcher(launcher: int | None = None) -> None:
    """Ends this rank with its launcher, which speaks for it when the run is interrupted."""
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
