"""API keys: a file with one on each line, compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path

from paceline.core.errors import UsageError


class ApiKeys:
    """The keys that open a server; without any, it is open.

    Args:
        keys: in clear; only their hashes are kept.
    """

    def __init__(self, keys: list[str]) -> None:
        self._digests = [_digest(key) for key in keys]

    @classmethod
    def from_file(cls, path: Path | None) -> ApiKeys:
        """Reads one key a line; empty lines and lines that begin with # are skipped.

        Raises:
            UsageError: no such file, or no key in it.
        """
        if path is None:
            return cls([])
        try:
            lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        except OSError as error:
            raise UsageError(f"cannot read {path}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise UsageError(f"cannot read {path}: {error}") from error
        keys = [line for line in lines if line and not line.startswith("#")]
        if not keys:
            raise UsageError(f"{path} holds no key", hint="one key on each line")
        return cls(keys)

    def __bool__(self) -> bool:
        return bool(self._digests)

    def opens(self, authorization: str) -> bool:
        """Whether an Authorization header holds a key; every key is compared, always."""
        return self.tenant_of(authorization) is not None

    def tenant_of(self, authorization: str) -> str | None:
        """A name for whoever has the key in an Authorization header; None without a right one.

        Without keys everybody is one tenant, of no name.
        """
        digest = _digest(authorization.removeprefix("Bearer "))
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        if not self._digests:
            return ""
        return digest.hex() if authorization.startswith("Bearer ") and any(matches) else None


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
