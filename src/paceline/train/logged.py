"""How far a run has come, as its records tell while they are being written."""

from __future__ import annotations

import json
from pathlib import Path

from paceline.train.run import RunFolder


class LoggedSteps:
    """Reads on where it has stopped reading, so that asking often costs little.

    Args:
        folder: of the run, which need not be there yet.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder.records(0).parent
        self._read_bytes: dict[Path, int] = {}
        self._last_step: int | None = None

    def begin(self) -> None:
        """Forgets what has been logged so far: a run may go back and take steps again."""
        self.last_step()
        self._last_step = None

    def last_step(self) -> int | None:
        """The last step that any rank has finished since the beginning; None while none has."""
        for path in self._folder.glob("rank-*.jsonl"):
            for line in self._new_lines(path):
                record = json.loads(line)
                if record["kind"] == "step":
                    self._last_step = max(self._last_step or 0, record["step"])
        return self._last_step

    def _new_lines(self, path: Path) -> list[bytes]:
        """Whole lines alone: the last one may be half written, and is cut off after a kill."""
        with path.open("rb") as file:
            file.seek(self._read_bytes.get(path, 0))
            content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        self._read_bytes[path] = self._read_bytes.get(path, 0) + len(whole)
        return whole.splitlines()
