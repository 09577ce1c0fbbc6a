"""Other programs that run the same files, each in a process of its own.

A file here beside this one is the driven side of a peer: a program that needs nothing of
mla_backend, so that any interpreter which has the peer can run it. One JSON request per line comes
in, one answer per line goes out:

    {}                                                  -> {"version": ...} or {"missing": why}
    {"model", "n_ctx", "threads", "n_batch", "on_gpu", "has_query_latent"}  -> {}
    {"ids", "keep", "one_by_one"}                       -> {"seconds": ...}

or {"error": why} where a request fails.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from mla_backend.errors import DeviceError, UnsupportedError, UsageError

_HERE: Final = Path(__file__).parent
_TELLS_S: Final = 10.0
#: Name -> file of the driven side.
PEERS: Final = {"llama-cpp-python": "llama_cpp_python.py"}


class Peer:
    """A peer's process, without a model until ``load``.

    Attributes:
        name: with its version.
    """

    def __init__(self, name: str, python: str | Path = sys.executable) -> None:
        """Start it under the interpreter ``python``.

        Raises UsageError for an unknown name, UnsupportedError where the peer is not installed.
        """
        if name not in PEERS:
            raise UsageError(f"peer {name!r}; accepted are {', '.join(PEERS)}")
        self.name = name
        command = [str(python), str(_HERE / PEERS[name])]
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        except OSError as error:
            raise UsageError(f"peer {name}: {python}: {error.strerror}") from None
        try:
            found = self._ask()
        except BaseException:
            self.close()
            raise
        if "missing" in found:
            self.close()
            raise UnsupportedError(
                f"peer {name}: {found['missing']} ({python}); it is there after "
                f"'pip install {name}', or name the interpreter that has it"
            )
        self.name = f"{name} {found['version']}"

    def load(
        self,
        model: str | Path,
        *,
        n_ctx: int,
        threads: int,
        n_batch: int,
        on_gpu: bool,
        has_query_latent: bool = True,
    ) -> None:
        """Load the file, on the GPUs or not. Raises DeviceError where the peer refuses."""
        self._ask(
            model=str(model),
            n_ctx=n_ctx,
            threads=threads,
            n_batch=n_batch,
            on_gpu=on_gpu,
            has_query_latent=has_query_latent,
        )

    def feed(self, ids: Sequence[int], *, keep: int, one_by_one: bool = False) -> float:
        """Go back to ``keep`` positions and feed ``ids``; returns seconds."""
        answer = self._ask(ids=list(ids), keep=keep, one_by_one=one_by_one)
        return float(answer["seconds"])

    def close(self) -> None:
        """End the process."""
        if self._process.stdin is not None:
            with suppress(BrokenPipeError):  # what it no longer reads
                self._process.stdin.close()
        try:
            self._process.wait(_TELLS_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def __enter__(self) -> Peer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _ask(self, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise DeviceError(f"peer {self.name}: its process ended; its messages are above")
        found: dict[str, Any] = json.loads(answer)
        if "error" in found:
            raise DeviceError(f"peer {self.name}: {found['error']}")
        return found
