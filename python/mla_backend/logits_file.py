"""Log-probabilities of one model, kept to compare others with: llama.cpp's file of that purpose.

    "_logits_", n_ctx, n_vocab, n_chunks: int32       tokens: int32 [n_chunks, n_ctx]
    per scored token: scale, lowest: float32          codes: uint16 [n_vocab, made even]

log p = lowest + scale * code. llama.cpp cuts the range at 16 nats below the likeliest token; here
it is as wide as the row needs, up to 100, so that no probability of note is raised.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Final

import numpy as np
import numpy.typing as npt

from mla_backend.chunks import Chunks
from mla_backend.errors import FormatError, UsageError
from mla_backend.likelihood import log_softmax

MAGIC: Final = b"_logits_"
_RANGE: Final = 100.0  # nats below the likeliest token that codes reach: a step is 0.0015 at most
_MOST: Final = 65535


def _row_type(n_vocab: int) -> np.dtype[np.void]:
    n_codes = n_vocab + n_vocab % 2
    return np.dtype([("scale", "<f4"), ("lowest", "<f4"), ("codes", "<u2", (n_codes,))])


def is_logits_file(path: Path) -> bool:
    """Whether a file begins like one. Raises OSError where it cannot be read."""
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


class LogitsWriter:
    """Writes one file, chunk by chunk; it takes its name when complete.

    Raises OSError where it cannot be written.
    """

    def __init__(self, path: Path, chunks: Chunks, n_vocab: int) -> None:
        self._path = path
        self._partial = path.with_name(f".{path.name}.part")
        self._file: BinaryIO = self._partial.open("wb")
        self._row = _row_type(n_vocab)
        self._n_vocab = n_vocab
        head = np.array([chunks.n_ctx, n_vocab, len(chunks)], "<i4")
        self._file.write(MAGIC + head.tobytes() + chunks.text.astype("<i4").tobytes())

    def add(self, logits: npt.NDArray[np.float32]) -> None:
        """The scored rows of the next chunk, logits [T, V]."""
        rows = np.zeros(len(logits), self._row)
        for row, values in zip(rows, logits, strict=True):
            log_p = log_softmax(values)
            lowest = max(log_p.min(), log_p.max() - _RANGE)
            scale = (log_p.max() - lowest) / _MOST
            row["scale"], row["lowest"] = scale, lowest
            if scale > 0:
                codes = np.rint((log_p - lowest) / scale)
                row["codes"][: self._n_vocab] = np.clip(codes, 0, _MOST)
        self._file.write(rows.tobytes())

    def __enter__(self) -> LogitsWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        if kind is None:
            self._partial.replace(self._path)
        else:
            self._partial.unlink(missing_ok=True)


class LogitsFile:
    """A file of log-probabilities, mapped.

    Raises FormatError where it is none, or shorter than it says.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        n_bytes = path.stat().st_size
        start = len(MAGIC) + 12
        with path.open("rb") as file:
            head = file.read(start)
            if head[: len(MAGIC)] != MAGIC or len(head) < start:
                raise FormatError(f"{path}: found {head[:8]!r}; accepted: {MAGIC!r}")
            self.n_ctx, self.n_vocab, n = map(int, np.frombuffer(head[len(MAGIC) :], "<i4"))
            if min(self.n_ctx, self.n_vocab, n) < 1:
                raise FormatError(f"{path}: {n} chunks of {self.n_ctx}, vocabulary {self.n_vocab}")
            self._scored = self.n_ctx - 1 - self.n_ctx // 2
            row = _row_type(self.n_vocab)
            body = start + 4 * n * self.n_ctx
            expected = body + n * self._scored * row.itemsize
            if n_bytes < expected:
                raise FormatError(f"{path}: {n_bytes} bytes; what it announces takes {expected}")
            tokens = np.frombuffer(file.read(4 * n * self.n_ctx), "<i4")
        self.tokens = tokens.reshape(n, self.n_ctx)
        self._rows = np.memmap(path, row, "r", body, (n, self._scored))

    def check(self, chunks: Chunks, n_vocab: int) -> None:
        """Raise UsageError unless these are the file's chunks, or its first ones."""
        if (self.n_ctx, self.n_vocab) != (chunks.n_ctx, n_vocab):
            raise UsageError(
                f"{self.path} has chunks of {self.n_ctx} and a vocabulary of {self.n_vocab}; "
                f"here they are {chunks.n_ctx} and {n_vocab}"
            )
        n = len(chunks)
        # Programs differ in whether the first token of a chunk is the text's or BOS.
        if len(self.tokens) < n or not np.array_equal(self.tokens[:n, 1:], chunks.text[:, 1:]):
            raise UsageError(f"{self.path} was made from another text, or from less of it")

    def log_probs(self, index: int) -> npt.NDArray[np.float32]:
        """Of the scored tokens of a chunk, float32 [T, V]."""
        rows = self._rows[index]
        codes = rows["codes"][:, : self.n_vocab].astype(np.float32)
        codes *= rows["scale"][:, None]
        codes += rows["lowest"][:, None]
        return codes  # type: ignore[no-any-return]
