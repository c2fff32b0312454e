"""Starting ranks: `torchrun` on this machine, unless a launcher has started us already."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Sequence

from paceline.core.env import rank_environment

_POLL_S = 0.5


def launch_ranks(num_ranks: int, arguments: Sequence[str]) -> None:
    """Replaces this process by `torchrun` running ``paceline ARGUMENTS`` on `num_ranks` ranks.

    On several machines `torchrun --nnodes` is started by hand; then this is not called.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(num_ranks), "--module", "paceline", *arguments]
    threads = max(1, (os.cpu_count() or 1) // num_ranks)
    os.execve(sys.executable, command, {"OMP_NUM_THREADS": str(threads), **os.environ})


def is_launched() -> bool:
    """Whether a launcher has started this process as a rank."""
    return rank_environment() is not None


def end_with_parent() -> None:
    """Ends this rank soon after its launcher is gone, so that a killed run leaves no orphans."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_POLL_S)
        os._exit(1)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()
