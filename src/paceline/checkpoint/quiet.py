"""What torch's distributed checkpoint says that is no news, and how it says what is."""

from __future__ import annotations

import warnings
from collections.abc import Generator
from contextlib import contextmanager

from torch.distributed.checkpoint import CheckpointException


@contextmanager
def quiet() -> Generator[None]:
    """Silences what torch says of a process without a group, which is what we asked for.

    Of torch's bundle of what went wrong on all ranks, interrupts among it, the first is raised.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.distributed is disabled.*")
        warnings.filterwarnings("ignore", message=".*TypedStorage is deprecated.*")
        try:
            yield
        except CheckpointException as error:
            cause, _ = next(iter(error.failures.values()))
            raise cause from None
