"""Finds out which settings are fastest for one model on this machine, in about two minutes.

Threads first, by decoding and a short prompt; with the best of them the length of passes, and last,
at some depth, the type of the cache. Contestants take turns, so that what disturbs the machine
disturbs them all, and the medians decide.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

import numpy as np

from mla_backend import _core
from mla_backend.benchmark import WARM_UP_TOKENS, OurProgram
from mla_backend.cache import CACHE_TYPES
from mla_backend.errors import MemoryLimitError, UsageError
from mla_backend.model import Model
from mla_backend.session import Session
from mla_backend.tuned import Tuned, model_key
from mla_backend.weights import check as check_weights

Progress = Callable[[str, int, int], None]
_T = TypeVar("_T")

#: Tokens of prefill and of decode by which threads are compared.
_SHORT_PROMPT: Final = 128
_SHORT_ANSWER: Final = 8
_REPEATS: Final = 3
_BATCHES: Final = (512, 1024, 2048, 4096)
#: Other threads than one per core, longer passes, which take more memory, and another cache type,
#: which has other numbers, must gain this much.
_GAIN: Final = 1.02
_CACHE_GAIN: Final = 1.05
_BASE_CACHE: Final = "f16"
_OTHER_CACHE: Final = "q8_0"
#: What the measurements of threads, passes and cache types may take, in seconds.
_THREADS_S, _PASSES_S, _CACHE_S = 35.0, 60.0, 25.0


@dataclass(frozen=True)
class Trial:
    """One contestant. ``prefill_tps`` and ``decode_tps``: medians, None where not measured.

    Attributes:
        what: "threads", "batch" or "cache".
        value: the setting.
        depth: positions cached before a decode.
        is_best: whether it won.
    """

    what: str
    value: str
    prefill_tps: float | None
    decode_tps: float | None
    depth: int = 0
    is_best: bool = False


@dataclass(frozen=True)
class Tuning:
    """What was found: ``settings`` are what ``TunedFile.store`` takes under the key ``model``."""

    model: str
    settings: Tuned
    trials: tuple[Trial, ...]


class Contestant(Protocol):
    """A model loaded with some settings."""

    n_batch: int  # the longest pass that memory allows

    def prefill(self, n_tokens: int, n_batch: int) -> float:
        """Seconds of a prompt in passes of ``n_batch``, which fills the cache up to there."""

    def decode(self, n_tokens: int, depth: int) -> float:
        """Seconds of so many single tokens after ``depth`` cached positions."""


#: Loads a contestant: (threads or None for the default, cache type).
Open = Callable[[int | None, str], Contestant]


def tune(path: str | Path, on_progress: Progress | None = None, **options: Any) -> Tuning:
    """Try settings for a model on the CPU.

    Args:
        on_progress: called as ("tune", trials done, trials in all).
        options: of ``Model.load``, as the model is going to be loaded: numa, isa, mmap.

    Raises what ``Model.load`` raises.
    """
    with ExitStack() as stack:
        first = stack.enter_context(Model.load(path, **_load_options(options), tuned=False))
        opened = _Loaded(path, options, stack, first)
        threads: Sequence[int | None] = (None,) if opened.is_placed else thread_counts()
        alone = opened.is_placed
        search = Search(opened, threads, first.n_ctx, on_progress, compare_caches=not alone)
        infos = check_weights(first.config, first.file).values()
        settings = search.run()
        return Tuning(model_key(first.config, infos), settings, tuple(search.trials))


def thread_counts() -> list[int]:
    """What is tried: one thread per physical core, some fewer, and all hardware threads."""
    cores, cpus = _core.usable_physical_cores(), len(_core.usable_cpus())
    fewer = {math.ceil(cores * share) for share in (0.5, 0.75)} | {cores - 1}
    more = {cpus} if _core.cpu_quota_cores() is None else set()
    return sorted(n for n in fewer | {cores} | more if n > 0)


class Search:
    """The order of the trials, and who wins. ``trials``: all that were made."""

    def __init__(
        self,
        open: Open,
        threads: Sequence[int | None],
        n_ctx: int,
        on_progress: Progress | None = None,
        *,
        compare_caches: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._open = open
        self._compare_caches = compare_caches
        self._threads = threads
        self._n_ctx = n_ctx
        self._on_progress = on_progress or (lambda *_: None)
        self._clock = clock
        self._n_done = 0
        # Passes and cache types are a fixed number; more threads are more trials.
        self._n_all = _REPEATS * (len(threads) + len(_BATCHES) + 2)
        self.trials: list[Trial] = []

    def run(self) -> Tuned:
        """All trials; returns the winners."""
        threads, rate = self._best_threads()
        contestant = self._open(threads, _BASE_CACHE)
        n_batch, depth = self._best_batch(contestant, rate)
        cache_type = self._best_cache(contestant, threads, depth, rate)
        self._on_progress("tune", self._n_all, self._n_all)
        return Tuned(threads, n_batch, cache_type, date.today().isoformat())

    def _best_threads(self) -> tuple[int | None, float]:
        """The best count, and its rate of prefill."""
        prompt = min(_SHORT_PROMPT, self._n_ctx // 2)
        answer = min(_SHORT_ANSWER, self._n_ctx - prompt)
        contestants = {n: self._open(n, _BASE_CACHE) for n in self._threads}
        taken: dict[int | None, list[tuple[float, float]]] = {n: [] for n in contestants}
        for contestant in contestants.values():  # plans are made, pages come in
            contestant.prefill(prompt, prompt)
        for n in self._turns(list(contestants), _THREADS_S):
            prefill = prompt / contestants[n].prefill(prompt, prompt)
            taken[n].append((prefill, answer / contestants[n].decode(answer, prompt)))
        rates = {n: _medians(pairs) for n, pairs in taken.items() if pairs}
        scores = {n: math.sqrt(prefill * decode) for n, (prefill, decode) in rates.items()}
        usual = next((n for n in scores if n == _core.usable_physical_cores()), None)
        best = max(scores, key=lambda n: scores[n] * (_GAIN if n == usual else 1.0))
        for n, (prefill, decode) in rates.items():
            value = "by node" if n is None else str(n)
            self.trials.append(Trial("threads", value, prefill, decode, prompt, n == best))
        return best, rates[best][0]

    def _best_batch(self, contestant: Contestant, rate: float) -> tuple[int, int]:
        """The best length of a pass, and how many positions the cache holds at the end."""
        most = min(contestant.n_batch, self._n_ctx - _SHORT_ANSWER - WARM_UP_TOKENS)
        sizes = [n for n in _BATCHES if n <= most] or [max(most, 1)]
        # One prompt for all of them; plans are made with the first turn, which takes no time then.
        while len(sizes) > 1 and len(sizes) * sizes[-1] / rate > _PASSES_S / 2:
            sizes.pop()
        prompt = sizes[-1]
        taken: dict[int, list[float]] = {n: [] for n in sizes}
        for n in self._turns(sizes, _PASSES_S):
            taken[n].append(prompt / contestant.prefill(prompt, n))
        rates = {n: statistics.median(rates) for n, rates in taken.items() if rates}
        best = min(rates)
        for n in sorted(rates):
            best = n if rates[n] >= _GAIN * rates[best] else best
        for n, prefill in rates.items():
            self.trials.append(Trial("batch", str(n), prefill, None, 0, n == best))
        # What took too long to try is not known to be worse.
        fastest_tried = best == sizes[-1] and sizes[-1] < min(most, _BATCHES[-1])
        return (most if fastest_tried else best), prompt

    def _best_cache(
        self, contestant: Contestant, threads: int | None, depth: int, rate: float
    ) -> str:
        if _OTHER_CACHE not in CACHE_TYPES or not self._compare_caches:
            return _BASE_CACHE
        depth = max(1, min(depth, int(rate * _CACHE_S / 4)))
        try:
            contestants = {_BASE_CACHE: contestant, _OTHER_CACHE: self._open(threads, _OTHER_CACHE)}
        except (UsageError, MemoryLimitError):  # no such blocks in the latent, or no room
            return _BASE_CACHE
        taken: dict[str, list[float]] = {name: [] for name in contestants}
        begin = self._clock()
        for one in contestants.values():
            one.prefill(depth, depth)
        left = _CACHE_S - (self._clock() - begin)
        for name in self._turns(list(contestants), left):
            taken[name].append(_SHORT_ANSWER / contestants[name].decode(_SHORT_ANSWER, depth))
        rates = {name: statistics.median(rates) for name, rates in taken.items() if rates}
        better = rates.get(_OTHER_CACHE, 0.0) >= _CACHE_GAIN * rates[_BASE_CACHE]
        best = _OTHER_CACHE if better else _BASE_CACHE
        for name, decode in rates.items():
            self.trials.append(Trial("cache", name, None, decode, depth, name == best))
        return best

    def _turns(self, contestants: Sequence[_T], seconds: float) -> Iterator[_T]:
        """Each contestant in turn, again and again; all of them once, whatever that takes."""
        end = self._clock() + seconds
        for repeat in range(_REPEATS):
            for contestant in contestants:
                if repeat and self._clock() >= end:
                    return
                self._on_progress("tune", min(self._n_done, self._n_all - 1), self._n_all)
                yield contestant
                self._n_done += 1


def _medians(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    return statistics.median(p for p, _ in pairs), statistics.median(d for _, d in pairs)


def _load_options(options: dict[str, Any]) -> dict[str, Any]:
    return {"n_ctx": _BATCHES[-1] + 64, "device": "cpu", **options}


class _Loaded:
    """Contestants are models of one mapped file, loaded when they are first asked for."""

    def __init__(
        self, path: str | Path, options: dict[str, Any], stack: ExitStack, first: Model
    ) -> None:
        self._path = path
        self._options = options
        self._stack = stack
        self._loaded = {(first.n_threads, _BASE_CACHE): _Timed(first, stack)}
        self._first = (first.n_threads, _BASE_CACHE)
        #: Placed weights are copies: there is room for one model, and its threads are the nodes'.
        self.is_placed = first.numa.mode != "off"

    def __call__(self, threads: int | None, cache_type: str) -> Contestant:
        key = (threads if threads is not None else self._first[0], cache_type)
        if key not in self._loaded:
            options = {**_load_options(self._options), "cache_type": cache_type, "tuned": False}
            if threads is not None:
                options["threads"] = threads
            model = self._stack.enter_context(Model.load(self._path, **options))
            self._loaded[key] = _Timed(model, self._stack)
        return self._loaded[key]


class _Timed:
    """A model as a contestant: its own context, as the last prefill left it."""

    def __init__(self, model: Model, stack: ExitStack) -> None:
        self.n_batch = model.n_batch
        self._model = model
        self._held = stack.enter_context(ExitStack())
        self._session: Session | None = None

    def prefill(self, n_tokens: int, n_batch: int) -> float:
        self._held.close()
        self._session = self._held.enter_context(self._model.own_session(n_batch=n_batch))
        return self._time(n_tokens, 0, one_by_one=False)

    def decode(self, n_tokens: int, depth: int) -> float:
        self._time(WARM_UP_TOKENS, depth, one_by_one=True)
        return self._time(n_tokens, depth, one_by_one=True)

    def _time(self, n_tokens: int, depth: int, *, one_by_one: bool) -> float:
        assert self._session is not None
        # Random ids spread over the experts as text does; the last of a vocabulary mean things.
        draw = np.random.default_rng(depth + n_tokens)
        ids = draw.integers(0, max(self._model.config.n_vocab // 2, 1), n_tokens).tolist()
        program = OurProgram(self._session, self._session.attention)
        return max(program.feed(ids, keep=depth, one_by_one=one_by_one), 1e-9)
