"""Logits to the next token.

The order is llama.cpp's: logits processors, logit bias, penalties, top-k, top-p, min-p, then
temperature; so the truncations look at the distribution at temperature 1. One uniform number is
drawn per sampled token, and none where the choice is greedy.

Where the best few logits of a row decide, the others need not be there: the choice is the same. The
log-probabilities, which take a sum over the row, may then differ in the last digits of float32.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .candidates import N_CANDIDATES, Candidates, Enough, FloatArray, LogitsRow
from .errors import ModelError, SessionError, ShapeError, UsageError
from .sampling_params import SamplingParams

__all__ = ["LogitsProcessor", "Sampled", "Sampler", "SamplingParams"]

IntArray = np.ndarray[Any, np.dtype[np.intp]]

# Takes all ids so far and a private copy of the logits, float32 [vocab]; returns logits alike.
LogitsProcessor = Callable[[Sequence[int], FloatArray], FloatArray]

_FIRST_SORTED = 1024  # candidates sorted before top-p asks for all: usually enough
_BLOCK = 64  # logits per block maximum: 129k give 2020 blocks, enough for every usual top-k
# Below this the best weighs all, as the least difference of two float32 already weighs e^-1e215; a
# quotient by it is still finite.
_COLDEST = 1e-260
_TOTAL_ERROR = 1e-5  # sums of exponentials differ by less, whoever computes them in float32


@dataclass(frozen=True, slots=True)
class Sampled:
    """One chosen token.

    Attributes:
        token: its id.
        logprob: natural logarithm of its probability under the model itself: temperature 1, no
            processors, bias, penalties or truncation.
        top_logprobs: (id, logprob) of the most probable tokens in that same distribution, best
            first, as many as ``SamplingParams.logprobs`` asks for.
    """

    token: int
    logprob: float
    top_logprobs: tuple[tuple[int, float], ...] = ()


class Sampler:
    """Chooses tokens for one sequence; owns that sequence's random numbers.

    Attributes:
        params: how to choose.
        seed: the seed in use, drawn if the parameters left it open.
        enough: tells whether the candidates of a row do for ``sample``; None: they never do.
    """

    def __init__(self, params: SamplingParams, processors: Sequence[LogitsProcessor] = ()) -> None:
        """Seed the generator (PCG64)."""
        self.params = params
        open_seed = params.seed is None or params.seed == -1
        self.seed = secrets.randbits(64) if open_seed else int(params.seed or 0)
        self._processors = tuple(processors)
        self._bits = np.random.PCG64(self.seed)
        self._uniform = np.random.Generator(self._bits).random
        self.enough: Enough | None = self._decides if self._uses_candidates() else None

    def _uses_candidates(self) -> bool:
        params = self.params
        if self._processors or params.logit_bias or params.has_penalties:
            return False
        cuts = params.top_k or params.top_p < 1 or params.min_p > 0
        wanted = max(params.top_k if params.temperature else 1, params.logprobs)
        return wanted <= N_CANDIDATES and bool(cuts or params.temperature == 0)

    def _decides(self, row: Candidates) -> bool:
        params = self.params
        if not math.isfinite(row.total) or params.logprobs > row.values.size:
            return False
        cut = 0 < params.top_k <= row.values.size and params.top_k < row.n_vocab
        return params.temperature == 0 or cut or _n_surviving(row, params) is not None

    def sample(self, logits: LogitsRow, history: Sequence[int] = ()) -> Sampled:
        """Choose the token that follows ``history``.

        Args:
            logits: float32 [vocab], not changed; or candidates that are ``enough``.
            history: all ids so far, the prompt included, oldest first.

        Raises:
            ShapeError: the logits, or what a processor made of them, are not [vocab].
            ModelError: the logits are not numbers, or all are -inf.
            UsageError: bias or processors leave no token, or name one outside the vocabulary; or
                the candidates do not decide.
        """
        if isinstance(logits, Candidates):
            return self._sample_best(logits)
        raw = np.asarray(logits, np.float32)
        if raw.ndim != 1 or raw.size == 0:
            raise ShapeError(f"sample: got logits of shape {list(raw.shape)}; expected [vocab]")
        best = float(raw.max())
        if not math.isfinite(best):
            raise ModelError(f"sample: {_describe_bad(raw)}; the model or its input is damaged")
        token = self._choose(self._modified(raw, history))
        log_total = best + math.log(float(np.exp(raw - np.float32(best)).sum(dtype=np.float64)))
        top = _best_ids(raw, self.params.logprobs) if self.params.logprobs else ()
        return Sampled(
            token,
            float(raw[token]) - log_total,
            tuple((int(i), float(raw[i]) - log_total) for i in top),
        )

    def _sample_best(self, row: Candidates) -> Sampled:
        best = float(row.values[0])
        index: int | None = 0
        if self.params.temperature != 0:
            n = _n_surviving(row, self.params)
            index = None if n is None else self._draw(row.values[:n], best)
        if index is None or self.enough is None:
            raise UsageError("sample: the candidates do not decide; give all logits")
        log_total = best + math.log(row.total)
        return Sampled(
            int(row.ids[index]),
            float(row.values[index]) - log_total,
            tuple(
                (int(row.ids[i]), float(row.values[i]) - log_total)
                for i in range(self.params.logprobs)
            ),
        )

    def state(self) -> dict[str, Any]:
        """What :meth:`restore` needs to go on identically; plain JSON, 128-bit numbers as text."""
        inner: Any = self._bits.state["state"]
        return {
            "generator": "PCG64",
            "seed": self.seed,
            "state": hex(inner["state"]),
            "increment": hex(inner["inc"]),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue where :meth:`state` was taken.

        Raises:
            SessionError: the state is damaged or of another kind.
        """
        try:
            if state["generator"] != "PCG64":
                raise SessionError(f"sampler state: generator is {state['generator']!r}, not PCG64")
            seed = int(state["seed"])
            inner: Any = {"state": int(state["state"], 16), "inc": int(state["increment"], 16)}
            self._bits.state = {
                "bit_generator": "PCG64",
                "state": inner,
                "has_uint32": 0,
                "uinteger": 0,
            }
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            if isinstance(error, SessionError):
                raise
            raise SessionError(f"sampler state is damaged: {error!r}") from error
        self.seed = seed

    def _modified(self, raw: FloatArray, history: Sequence[int]) -> FloatArray:
        """Logits after processors, bias and penalties, float32 [vocab]; raw itself without any."""
        params = self.params
        if not (self._processors or params.logit_bias or params.has_penalties):
            return raw
        logits = raw.copy()
        for processor in self._processors:
            logits = np.asarray(processor(history, logits), np.float32)
            if logits.shape != raw.shape:
                raise ShapeError(
                    f"sample: a logits processor made {list(logits.shape)} of {list(raw.shape)}"
                )
        _add_bias(logits, params.logit_bias)
        if params.has_penalties:
            _penalize(logits, history, params)
        return logits

    def _choose(self, logits: FloatArray) -> int:
        best = int(logits.argmax())  # the first NaN, if there is one
        top = float(logits[best])
        if not math.isfinite(top):
            raise UsageError(
                f"sample: after processors, bias and penalties {_describe_bad(logits)}"
            )
        temperature = self.params.temperature
        if temperature == 0:
            return best
        ids = _surviving(logits, top, self.params)
        index = self._draw(_take(logits, ids), top)
        return index if ids is None else int(ids[index])

    def _draw(self, values: FloatArray, top: float) -> int:
        """Index of one of the logits [n], each as likely as its temperature makes it."""
        cold = max(self.params.temperature, _COLDEST)
        bounds = np.exp((values.astype(np.float64) - top) / cold).cumsum()
        index = int(bounds.searchsorted(self._uniform() * bounds[-1], side="right"))
        if index == bounds.size:  # by rounding: the last that weighs anything is meant
            index = int(bounds.searchsorted(bounds[-1]))
        return index


def _take(logits: FloatArray, ids: IntArray | None) -> FloatArray:
    return logits if ids is None else logits[ids]


def _surviving(logits: FloatArray, top: float, params: SamplingParams) -> IntArray | None:
    """Ids that survive top-k, top-p and min-p, best first; None where all do.

    Min-p compares with the best logit, so it commutes with top-p as long as top-p's total is taken
    before it: applying it first leaves few ids to sort.
    """
    k = params.top_k if 0 < params.top_k < logits.size else 0
    if not k and params.top_p >= 1 and params.min_p <= 0:
        return None
    ids = _best_ids(logits, k) if k else None
    kept = _take(logits, ids)
    total = 0.0
    if params.top_p < 1:
        total = float(np.exp(kept - np.float32(top)).sum(dtype=np.float64))
    if params.min_p > 0:
        passed = np.flatnonzero(kept >= top + math.log(params.min_p))
        ids = _sorted_best(logits, passed) if ids is None else ids[passed]
    return ids if params.top_p >= 1 else _nucleus(logits, ids, top, params.top_p * total)


def _nucleus(logits: FloatArray, ids: IntArray | None, top: float, mass: float) -> IntArray:
    """The fewest best ids whose weights exp(logit - top) reach ``mass``; at least one."""
    n = _FIRST_SORTED
    while ids is None:  # peaked distributions need few; flat ones more and more
        some = _nucleus(logits, _best_ids(logits, n), top, mass)
        if some.size < n or n >= logits.size:
            return some
        n *= 8
    reached = np.exp(logits[ids].astype(np.float64) - top).cumsum()
    return ids[: int(reached.searchsorted(mass)) + 1]


def _n_surviving(row: Candidates, params: SamplingParams) -> int | None:
    """How many of the candidates ``_surviving`` finds, which are the first; None: it takes all
    logits to tell.

    It computes what ``_surviving`` does from the same numbers, but for top-p without top-k: that
    total is of all logits and known to _TOTAL_ERROR, and a choice as close as that is left open.
    """
    k = params.top_k if 0 < params.top_k < row.n_vocab else 0
    if k > row.values.size or not (k or params.top_p < 1 or params.min_p > 0):
        return None
    top = float(row.values[0])
    kept = row.values[:k] if k else row.values
    is_whole = bool(k) or kept.size == row.n_vocab  # no others survive
    total, error = row.total, _TOTAL_ERROR
    if k and params.top_p < 1:
        total = float(np.exp(kept - row.values[0]).sum(dtype=np.float64))
        error = 0.0
    if params.min_p > 0:
        n_kept = int(np.count_nonzero(kept >= top + math.log(params.min_p)))
        is_whole = is_whole or n_kept < kept.size
        kept = kept[:n_kept]
    if params.top_p >= 1:
        return kept.size if is_whole else None
    mass = params.top_p * total
    reached = np.exp(kept.astype(np.float64) - top).cumsum()
    high = int(reached.searchsorted(mass * (1 + error)))
    low = int(reached.searchsorted(mass * (1 - error))) if error else high
    if low != high or (high == kept.size and not is_whole):
        return None
    return min(high + 1, kept.size)


def _best_ids(logits: FloatArray, k: int) -> IntArray:
    """Ids of the k largest logits, best first, the lower id first among equals, [min(k, vocab)]."""
    if k >= logits.size:
        return _sorted_best(logits, np.arange(logits.size))
    ids = np.flatnonzero(logits >= _lower_bound(logits, k))
    values = logits[ids]
    least = np.partition(values, values.size - k)[values.size - k]
    return _sorted_best(logits, ids[values >= least])[:k]


def _lower_bound(logits: FloatArray, k: int) -> float:
    """A value that at least k logits reach: the k-th largest maximum of blocks.

    Partitioning 129k logits takes 1 ms, their block maxima a tenth of that; few logits beyond the
    k best pass the bound.
    """
    n_blocks = logits.size // _BLOCK
    if k > n_blocks:
        return -math.inf
    maxima = logits[: n_blocks * _BLOCK].reshape(n_blocks, _BLOCK).max(axis=1)
    return float(np.partition(maxima, n_blocks - k)[n_blocks - k])


def _sorted_best(logits: FloatArray, ids: IntArray) -> IntArray:
    """Ascending ids put in order of falling logits."""
    order: IntArray = ids[np.argsort(-logits[ids], kind="stable")]
    return order


def _add_bias(logits: FloatArray, bias: Mapping[int, float]) -> None:
    for token, value in bias.items():
        if token >= logits.size:
            raise UsageError(f"logit_bias names id {token}; ids are 0 .. {logits.size - 1}")
        logits[token] += value


def _penalize(logits: FloatArray, history: Sequence[int], params: SamplingParams) -> None:
    n = params.repeat_last_n
    window = np.asarray(history if n < 0 else history[-n:], np.int64)
    ids, counts = np.unique(window, return_counts=True)
    if ids.size and not (ids[0] >= 0 and ids[-1] < logits.size):
        bad = ids[0] if ids[0] < 0 else ids[-1]
        raise UsageError(f"history has id {bad}; ids are 0 .. {logits.size - 1}")
    values = logits[ids]
    penalty = np.float32(params.repeat_penalty)
    values = np.where(values > 0, values / penalty, values * penalty)
    values -= (counts * params.frequency_penalty + params.presence_penalty).astype(np.float32)
    logits[ids] = values


def _describe_bad(logits: FloatArray) -> str:
    nan = np.flatnonzero(np.isnan(logits))
    if nan.size:
        return f"{nan.size} of {logits.size} logits are NaN, the first at id {nan[0]}"
    if float(logits.max()) == -math.inf:
        return f"all {logits.size} logits are -inf"
    return f"the logit of id {int(logits.argmax())} is +inf"
