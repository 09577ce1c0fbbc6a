"""A session: one sequence in a latent cache, with the tokens that made it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import index
from pathlib import Path
from typing import Any

import numpy as np

from mla_backend import _core
from mla_backend.attention_mode import MODES, AttentionMode
from mla_backend.batching import pass_sizes
from mla_backend.cache import CacheSequence, LatentCache
from mla_backend.candidates import Enough, LogitsRow
from mla_backend.errors import ContextError, SessionError, ShapeError, UsageError
from mla_backend.runner import Logits, OnSteps, Piece, Runner
from mla_backend.session_file import SavedSession, read_session, write_session

Progress = Callable[[str, int, int], None]


class _Prefill:
    """Tells how far tokens are."""

    def __init__(self, on_progress: Progress, n_tokens: int) -> None:
        self._on_progress = on_progress
        self._n_tokens = n_tokens
        self.done(0)

    def done(self, n_done: int) -> None:
        """The first ``n_done`` are computed."""
        self._n_done = n_done
        self._on_progress("prefill", n_done, self._n_tokens)

    def within(self, size: int) -> OnSteps:
        """For the pass of the next ``size`` tokens."""
        before = self._n_done

        def on_steps(n_done: int, n_steps: int) -> None:
            self._on_progress("prefill", before + size * n_done // n_steps, self._n_tokens)

        return on_steps


@dataclass(frozen=True)
class _PromptEnd:
    """Logits [vocab] after the first ``n_tokens`` tokens."""

    n_tokens: int
    logits: Logits


class Session:
    """Tokens in, logits out; the past stays in the cache.

    Sessions are independent of each other, also in threads: passes through the model wait for each
    other. Those made by ``fork`` share the cache's room. One session is for one thread at a time.

    Attributes:
        tokens: ids of all positions held, oldest first.
        sampler_state: of the last sampler used, saved along.
    """

    def __init__(
        self, runner: Runner, cache: LatentCache, fingerprint: str, n_vocab: int, n_batch: int
    ) -> None:
        self._runner = runner
        self._cache = cache
        self._fingerprint = fingerprint
        self._n_vocab = n_vocab
        self._n_batch = n_batch
        self._held: CacheSequence | None = cache.add()
        self.tokens: list[int] = []
        self.sampler_state: dict[str, Any] | None = None
        self._prompt_end: _PromptEnd | None = None

    @property
    def _sequence(self) -> CacheSequence:
        if self._held is None:
            raise UsageError("the session is closed")
        return self._held

    @property
    def n_ctx(self) -> int:
        """Positions the cache was made for."""
        return self._cache.n_ctx

    @property
    def position(self) -> int:
        """Position of the next token."""
        return self._sequence.next_position

    @property
    def n_free(self) -> int:
        """Positions this session may still add."""
        return self.n_ctx - len(self.tokens)

    @property
    def attention(self) -> AttentionMode:
        """How attention is computed; setting it holds for all sessions that share the cache."""
        return self._runner.attention

    @attention.setter
    def attention(self, mode: AttentionMode) -> None:
        if mode not in MODES:
            raise UsageError(f"attention {mode!r}; accepted are {', '.join(MODES)}")
        with self._runner.lock:
            self._runner.attention = mode

    def feed(
        self,
        ids: Sequence[int],
        *,
        outputs: int = 1,
        cancel: _core.CancelToken | None = None,
        on_progress: Progress | None = None,
    ) -> Logits:
        """Append tokens, chunk by chunk.

        Args:
            ids: at least one token.
            outputs: how many of the last tokens' logits to return.
            cancel: honoured between the nodes of the graph; finished chunks stay.
            on_progress: called as ("prefill", tokens done, tokens in all), on a CPU also amid a
                chunk, for the part of its steps that are done.

        Returns:
            float32 [outputs, vocab].

        Raises:
            ContextError: before computing, if the tokens do not fit.
            ShapeError: no tokens, or an id outside the vocabulary.
            CancelledError: with the finished chunks in the cache; ``tokens`` tells which.
            UsageError: the session is closed, as in all other calls.
        """
        ids = [index(i) for i in ids]
        self._check(ids, outputs)
        rows: list[Logits] = []
        total = len(ids)
        begin = 0
        report = _Prefill(on_progress, total) if on_progress is not None else None
        for size in pass_sizes(total, self._n_batch):
            chunk = ids[begin : begin + size]
            wanted = max(0, min(size, begin + size - (total - outputs)))
            piece = Piece(self._sequence, chunk, wanted)
            on_steps = report.within(size) if report is not None else None
            with self._counted():
                rows.append(self._runner.run([piece], cancel, on_steps))
                self.tokens += chunk
            begin += size
            if report is not None:
                report.done(begin)
        return np.concatenate(rows) if len(rows) > 1 else rows[0]

    def step(
        self, token: int, enough: Enough | None, *, cancel: _core.CancelToken | None = None
    ) -> LogitsRow:
        """Append a token -> what choosing the next one takes of the logits after it.

        That is the candidates where they are enough, else all logits, float32 [vocab]: always
        without ``enough``. Raises as ``feed`` does.
        """
        if enough is None:
            logits: Logits = self.feed([token], cancel=cancel)[-1]
            return logits
        token = index(token)
        self._check([token], 1)
        with self._counted():
            (row,) = self._runner.run_for([Piece(self._sequence, [token])], [enough], cancel)
            self.tokens.append(token)
        return row

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """Whatever interrupts it, Ctrl-C included, leaves as many cells as tokens."""
        before = len(self.tokens)
        try:
            yield
        except BaseException:
            del self.tokens[before:]
            if self._sequence.n_cells > before:
                with self._runner.lock:
                    self._cache.truncate(self._sequence, before)
            raise

    def _check(self, ids: Sequence[int], outputs: int) -> None:
        if not 0 <= outputs <= len(ids) or not ids:
            raise ShapeError(
                f"{len(ids)} tokens and {outputs} rows of logits; give 1 token or more"
            )
        if len(ids) > self.n_free:
            raise ContextError(
                f"{len(ids)} tokens after {len(self.tokens)} exceed the context of {self.n_ctx}"
            )
        low, high = min(ids), max(ids)
        if low < 0 or high >= self._n_vocab:
            bad = low if low < 0 else high
            raise ShapeError(f"token id {bad}; accepted are 0 to {self._n_vocab - 1}")

    def reuse(self, ids: Sequence[int]) -> int:
        """Go back to the longest prefix shared with ``ids``.

        Returns how many of ``ids`` need not be fed again: all of them where they are the last
        prompt, else all but one at most, because the last one gives the logits.
        """
        limit = min(len(ids), len(self.tokens))
        shared = 0
        while shared < limit and self.tokens[shared] == ids[shared]:
            shared += 1
        if shared == len(ids) and (self._prompt_end is None or self._prompt_end.n_tokens != shared):
            shared -= 1
        self.truncate(shared)
        return shared

    def feed_prompt(
        self,
        ids: Sequence[int],
        *,
        cancel: _core.CancelToken | None = None,
        on_progress: Progress | None = None,
    ) -> Logits:
        """Feed what ``reuse`` left of a prompt -> logits after it, float32 [vocab].

        They are kept: the same prompt again takes no pass, and its answer the same way, so that
        equal seeds give equal texts. Raises as ``feed`` does.
        """
        if ids or self._prompt_end is None:
            last = self.feed(ids, cancel=cancel, on_progress=on_progress)[-1]
            self._prompt_end = _PromptEnd(len(self.tokens), last)
        return self._prompt_end.logits

    def truncate(self, n_tokens: int) -> None:
        """Forget all but the first ``n_tokens``."""
        with self._runner.lock:
            self._cache.truncate(self._sequence, n_tokens)
        del self.tokens[n_tokens:]
        self._forget_prompt_end(n_tokens)

    def _forget_prompt_end(self, n_kept: int) -> None:
        if self._prompt_end is not None and self._prompt_end.n_tokens > n_kept:
            self._prompt_end = None

    def drop(self, begin: int, end: int) -> None:
        """Forget tokens [begin, end); later ones move up. See ``LatentCache.drop``."""
        with self._runner.lock:
            self._cache.drop(self._sequence, begin, end)
        del self.tokens[begin:end]
        if begin < end:
            self._forget_prompt_end(begin)

    def keep_last(self, n_tokens: int) -> None:
        """Forget all but the last ``n_tokens``, whose positions stay; ``shift`` renumbers them."""
        with self._runner.lock:
            self._cache.keep_last(self._sequence, n_tokens)
        del self.tokens[: len(self.tokens) - n_tokens]
        self._prompt_end = None

    def shift(self, delta: int) -> None:
        """Add ``delta`` to all positions: only the rope part of the cache turns.

        Raises ShapeError where a position would become negative.
        """
        with self._runner.lock:
            self._cache.shift(self._sequence, delta)
        self._prompt_end = None

    def fork(self) -> Session:
        """A second session with the same past, in the same cache."""
        twin = object.__new__(Session)
        twin.__dict__.update(self.__dict__)
        with self._runner.lock:
            twin._held = self._cache.fork(self._sequence)
        twin.tokens = list(self.tokens)
        return twin

    def close(self) -> None:
        """Give the cells back to the cache; other calls raise UsageError from then on."""
        if self._held is None:
            return
        with self._runner.lock:
            held, self._held = self._held, None
            self._cache.remove(held)
        self.tokens = []
        self._prompt_end = None

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def save(self, path: str | Path) -> None:
        """Write latents, positions, tokens and sampler state; replaces ``path`` when complete.

        Raises SessionError where it cannot be written; an old file is then as before.
        """
        state = SavedSession(
            fingerprint=self._fingerprint,
            cache_type=self._cache.cache_type,
            first_position=self._sequence.first_position,
            tokens=self.tokens,
            sampler_state=self.sampler_state,
        )
        with self._runner.lock:
            cells = self._cache.read(self._sequence)
        write_session(Path(path), state, cells)

    def load(self, path: str | Path) -> None:
        """Replace the session by a saved one.

        Raises SessionError where the file is damaged, or made by another model or cache type, and
        ContextError where it does not fit; the session is then as before.
        """
        state, cells = read_session(Path(path))
        for what, ours, theirs in (
            ("model", self._fingerprint, state.fingerprint),
            ("cache type", self._cache.cache_type, state.cache_type),
        ):
            if ours != theirs:
                raise SessionError(f"{path}: saved with {what} {theirs}; this one is {ours}")
        if cells.size != len(state.tokens) * self._cache.bytes_per_position:
            raise SessionError(
                f"{path}: {cells.size} bytes of cells for {len(state.tokens)} positions of "
                f"{self._cache.bytes_per_position}"
            )
        n_tokens = len(state.tokens)
        if n_tokens > self.n_ctx or not self._cache.fits(self._sequence, n_tokens):
            raise ContextError(
                f"{path}: {n_tokens} positions do not fit: the context holds {self.n_ctx}, and "
                f"{self._cache.n_free_cells} positions of the cache are free"
            )
        self.truncate(0)
        with self._runner.lock:
            self._sequence.first_position = state.first_position
            self._cache.write(self._sequence, cells)
        self.tokens = list(state.tokens)
        self.sampler_state = state.sampler_state
