"""What of an unfinished file is on the disk for good, so that a second run goes on from there.

The journal lies beside the file. Its first line identifies the work: another checkpoint, other
options or another build of the encoders begin anew. Each further line lists pieces, and is written
after their bytes have reached the disk.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from ..errors import UsageError

_VERSION: Final = 1


class Journal:
    """An open journal, locked against a second process that writes the same file.

    Attributes:
        done: pieces that are on the disk.
    """

    def __init__(self, path: Path, fingerprint: str) -> None:
        """Open or create it; ``done`` is empty unless it has this ``fingerprint``.

        Raises:
            UsageError: another process works on the same file.
        """
        self._path = path
        self._file = path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise UsageError(f"{path}: another process is writing this file") from error
        self._head = {"version": _VERSION, "fingerprint": fingerprint}
        self.done = self._read()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def restart(self) -> None:
        """Forget all pieces."""
        self.done = set()
        self._file.seek(0)
        self._file.truncate()
        self._append(json.dumps(self._head))

    def record(self, pieces: Iterable[int]) -> None:
        """Add pieces whose bytes are on the disk."""
        added = sorted(pieces)
        if added:
            self._append(" ".join(map(str, added)))
            self.done.update(added)

    def remove(self) -> None:
        """Delete it: the file is complete, or not worth going on with."""
        self._path.unlink(missing_ok=True)

    def _append(self, line: str) -> None:
        self._file.seek(0, os.SEEK_END)
        self._file.write(line.encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def _read(self) -> set[int]:
        """The pieces; a line without an end was being written when the process died."""
        self._file.seek(0)
        complete, _, torn = self._file.read().rpartition(b"\n")
        if torn:
            self._file.truncate(len(complete) + 1 if complete else 0)
        lines = complete.splitlines()
        if not lines or _parsed(lines[0]) != self._head:
            self.restart()
            return set()
        try:
            return {int(piece) for line in lines[1:] for piece in line.split()}
        except ValueError:
            self.restart()
            return set()


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None
