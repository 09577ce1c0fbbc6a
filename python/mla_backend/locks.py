"""A lock for calls on one model, which knows about forks and about its own thread."""

from __future__ import annotations

import os
import threading
from typing import Final

from mla_backend.errors import DeviceError, UsageError

#: How long a waiting thread sleeps before it looks whether the holder still exists.
_PATIENCE_S: Final = 1.0


class CallLock:
    """One call at a time; others wait.

    What would wait for ever is an error instead: a second call from the thread that holds the lock
    (UsageError with the message given), and any call in a forked child where another thread held
    it, for that thread was not forked (DeviceError).
    """

    def __init__(self, busy: str) -> None:
        self._busy = busy
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._owner: tuple[int, int] | None = None  # process and thread

    def __enter__(self) -> None:
        owner = self._owner
        if owner is not None:
            if owner[1] == threading.get_ident():
                raise UsageError(self._busy)
            self._check_process(owner[0])
        while not self._lock.acquire(timeout=_PATIENCE_S):
            self._check_process(self._owner[0] if self._owner is not None else self._pid)
        self._owner = (os.getpid(), threading.get_ident())

    def __exit__(self, *_: object) -> None:
        self._owner = None
        self._lock.release()

    def _check_process(self, pid: int) -> None:
        if pid != os.getpid():
            raise DeviceError(
                "this process was forked while another thread was using the model; "
                "load the model in the child"
            )
