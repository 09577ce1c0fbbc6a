"""Reading a header forwards, without ever trusting a length that it states.

The header is copied into memory by plain reads, window by window: a file that is truncated while
we look at it then gives an error, where a mapping would kill the process.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np
import numpy.typing as npt

from ..errors import ModelError

#: A 256k-token vocabulary with merges takes 20 MB; beyond this a length is damaged, not large.
HEADER_LIMIT_BYTES = 256 << 20
_FIRST_WINDOW_BYTES = 1 << 20
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


class Cursor:
    """A position in a header of a file of ``n_bytes``.

    ``what`` arguments name the field for errors. Every method raises ModelError when the field
    would pass the end of the file or HEADER_LIMIT_BYTES, before anything is allocated for it.
    """

    def __init__(self, file: BinaryIO, path: Path, n_bytes: int) -> None:
        self.path = path
        self.n_bytes = n_bytes
        self.pos = 0
        self._file = file
        self._window = b""

    @property
    def remaining(self) -> int:
        """Bytes between here and the end of the file."""
        return self.n_bytes - self.pos

    def fail(self, what: str, found: str, accepted: str) -> NoReturn:
        """Raise ModelError: file, field, what was found, what is accepted."""
        raise ModelError(f"{self.path}: {what}: found {found}; accepted: {accepted}")

    def peek(self, count: int) -> bytes:
        """Up to ``count`` bytes from here, fewer at the end of the file."""
        count = min(count, self.remaining)
        self._grow(self.pos + count, "magic")
        return self._window[self.pos : self.pos + count]

    def u32(self, what: str) -> int:
        """An unsigned 32-bit integer."""
        start = self._take(4, what)
        return int(_U32.unpack_from(self._window, start)[0])

    def u64(self, what: str) -> int:
        """An unsigned 64-bit integer."""
        start = self._take(8, what)
        return int(_U64.unpack_from(self._window, start)[0])

    def count(self, what: str, least_bytes: int) -> int:
        """A u64 count of entries that take at least ``least_bytes`` each."""
        value = self.u64(what)
        if value * least_bytes > self.remaining:
            self.fail(
                what,
                f"{value}, at least {value * least_bytes} bytes",
                f"what fits the {self.remaining} bytes that follow",
            )
        return value

    def string(self, what: str, limit_bytes: int = HEADER_LIMIT_BYTES) -> str:
        """A length and that many bytes of UTF-8."""
        length = self.u64(f"{what}: length")
        if length > limit_bytes:
            self.fail(f"{what}: length", f"{length} bytes", f"at most {limit_bytes}")
        start = self._take(length, what)
        data = self._window[start : start + length]
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            self.fail(what, f"invalid UTF-8 ({error.reason}) in {data[:40]!r}", "valid UTF-8")

    def strings(self, count: int, what: str) -> tuple[str, ...]:
        """``count`` strings. Vocabularies pass here: the loop does nothing it could leave out."""
        out: list[str] = []
        append, unpack = out.append, _U64.unpack_from
        window, pos, n_window = self._window, self.pos, len(self._window)
        try:
            for _ in range(count):
                start = pos + 8
                if start > n_window:
                    window = self._grow(start, f"{what}[{len(out)}]: length")
                    n_window = len(window)
                pos = start + unpack(window, pos)[0]
                if pos > n_window:
                    window = self._grow(pos, f"{what}[{len(out)}]")
                    n_window = len(window)
                append(window[start:pos].decode())
        except UnicodeDecodeError as error:
            self.fail(
                f"{what}[{len(out)}]",
                f"invalid UTF-8 ({error.reason}) in {window[start:pos][:40]!r}",
                "valid UTF-8",
            )
        self.pos = pos
        return tuple(out)

    def numbers(self, count: int, dtype: np.dtype[Any], what: str) -> npt.NDArray[Any]:
        """``count`` packed numbers -> a read-only copy [count]."""
        start = self._take(count * dtype.itemsize, what)
        array = np.frombuffer(self._window, dtype, count, start).copy()
        array.flags.writeable = False
        return array

    def number(self, dtype: np.dtype[Any], what: str) -> int | float:
        """One number as a Python int or float."""
        start = self._take(dtype.itemsize, what)
        value: int | float = np.frombuffer(self._window, dtype, 1, start)[0].item()
        return value

    def _take(self, count: int, what: str) -> int:
        """Advance by ``count`` bytes that are in the window afterwards; the old position."""
        start = self.pos
        end = start + count
        if end > len(self._window):
            self._grow(end, what)
        self.pos = end
        return start

    def _grow(self, end: int, what: str) -> bytes:
        """Read on until the window holds the file's first ``end`` bytes."""
        have = len(self._window)
        if end <= have:
            return self._window
        if end > self.n_bytes:
            self.fail(
                what,
                f"the end of the file: needs {end} bytes, has {self.n_bytes}",
                "a complete file (is the download truncated?)",
            )
        if end > HEADER_LIMIT_BYTES:
            self.fail(what, f"a header of {end} bytes or more", f"at most {HEADER_LIMIT_BYTES}")
        # Doubling keeps the copies linear, whatever the lengths.
        goal = min(max(2 * have, end, _FIRST_WINDOW_BYTES), self.n_bytes, HEADER_LIMIT_BYTES)
        self._window += self._file.read(goal - have)
        if len(self._window) < end:
            self.fail(what, "a file that shrank while it was read", "a file that stays as it is")
        return self._window
