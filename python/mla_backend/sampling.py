"""Logits to the next token.

The order is llama.cpp's: logits processors, logit bias, penalties, top-k, top-p, min-p, then
temperature; so the truncations look at the distribution at temperature 1. One uniform number is
drawn per sampled token, and none where the choice is greedy.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .errors import ModelError, SessionError, ShapeError, UsageError

FloatArray = np.ndarray[Any, np.dtype[np.float32]]
IntArray = np.ndarray[Any, np.dtype[np.intp]]

# Takes all ids so far and a private copy of the logits, float32 [vocab]; returns logits alike.
LogitsProcessor = Callable[[Sequence[int], FloatArray], FloatArray]

_FIRST_SORTED = 1024  # candidates sorted before top-p asks for all: usually enough
_BLOCK = 64  # logits per block maximum: 129k give 2020 blocks, enough for every usual top-k
_SEED_LIMIT = 2**64


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens; the defaults are llama.cpp's.

    Attributes:
        temperature: 0 takes the most probable token, the lowest id among equals.
        top_k: keep this many; 0 keeps all.
        top_p: keep the most probable tokens that together reach this; 1 keeps all.
        min_p: keep tokens at least this times as probable as the best; 0 keeps all.
        repeat_penalty: divides positive and multiplies negative logits of recent tokens; 1 is off.
        repeat_last_n: how many tokens count as recent, the prompt included; -1 means all.
        frequency_penalty: subtracted once per recent occurrence.
        presence_penalty: subtracted once where there is any recent occurrence.
        seed: 0 .. 2^64 - 1; -1 draws one, which ``Sampler.seed`` then tells. So does None, except
            where a prompt goes on from what its session holds: then the random numbers go on too.
        logprobs: how many most probable alternatives to report per token.
        logit_bias: added to the logits of single ids; -inf forbids a token.
        stop: texts that end generation; the sampler itself does not use them.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int | None = None
    logprobs: int = 0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: Sequence[str] = ()

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            UsageError: naming the option, its value and what is accepted.
        """
        _check_float("temperature", self.temperature, 0.0, math.inf)
        _check_int("top_k", self.top_k, 0)
        _check_float("top_p", self.top_p, 0.0, 1.0)
        _check_float("min_p", self.min_p, 0.0, 1.0)
        _check_float("repeat_penalty", self.repeat_penalty, 0.0, math.inf)
        if self.repeat_penalty == 0:
            raise UsageError("repeat_penalty is 0; expected a number above 0")
        _check_int("repeat_last_n", self.repeat_last_n, -1)
        _check_float("frequency_penalty", self.frequency_penalty, -math.inf, math.inf)
        _check_float("presence_penalty", self.presence_penalty, -math.inf, math.inf)
        if self.seed is not None:
            _check_int("seed", self.seed, -1, _SEED_LIMIT - 1)
        _check_int("logprobs", self.logprobs, 0)
        object.__setattr__(self, "logit_bias", _checked_bias(self.logit_bias))
        object.__setattr__(self, "stop", _checked_stop(self.stop))

    @property
    def has_penalties(self) -> bool:
        """Whether recent tokens change the logits."""
        penalties = self.frequency_penalty != 0 or self.presence_penalty != 0
        return (penalties or self.repeat_penalty != 1) and self.repeat_last_n != 0


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
    """

    def __init__(self, params: SamplingParams, processors: Sequence[LogitsProcessor] = ()) -> None:
        """Seed the generator (PCG64)."""
        self.params = params
        open_seed = params.seed is None or params.seed == -1
        self.seed = secrets.randbits(64) if open_seed else int(params.seed or 0)
        self._processors = tuple(processors)
        self._bits = np.random.PCG64(self.seed)
        self._uniform = np.random.Generator(self._bits).random

    def sample(self, logits: FloatArray, history: Sequence[int] = ()) -> Sampled:
        """Choose the token that follows ``history``.

        Args:
            logits: float32 [vocab]; not changed.
            history: all ids so far, the prompt included, oldest first.

        Raises:
            ShapeError: the logits, or what a processor made of them, are not [vocab].
            ModelError: the logits are not numbers, or all are -inf.
            UsageError: bias or processors leave no token, or name one outside the vocabulary.
        """
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
        ids = _candidates(logits, top, self.params)
        with np.errstate(over="ignore"):  # tiny temperatures: -inf weighs nothing
            weights = np.exp((_take(logits, ids).astype(np.float64) - top) / temperature)
        bounds = weights.cumsum()
        index = int(bounds.searchsorted(self._uniform() * bounds[-1], side="right"))
        # Rounding may reach the end; the last candidate that weighs anything is meant then.
        index = min(index, int(bounds.searchsorted(bounds[-1])))
        return index if ids is None else int(ids[index])


def _take(logits: FloatArray, ids: IntArray | None) -> FloatArray:
    return logits if ids is None else logits[ids]


def _candidates(logits: FloatArray, top: float, params: SamplingParams) -> IntArray | None:
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


def _check_float(name: str, value: object, low: float, high: float) -> None:
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float, np.integer, np.floating))
        or not (math.isfinite(value) and low <= value <= high)
    ):
        raise UsageError(f"{name} is {value!r}; expected {_range_text('a number', low, high)}")


def _check_int(name: str, value: object, low: int, high: float = math.inf) -> None:
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, np.integer))
        or not low <= int(value) <= high
    ):
        raise UsageError(f"{name} is {value!r}; expected {_range_text('an integer', low, high)}")


def _range_text(kind: str, low: float, high: float) -> str:
    if low == -math.inf:
        return f"{kind}, finite"
    return f"{kind} of at least {low:g}" if high == math.inf else f"{kind} from {low} to {high}"


def _checked_bias(bias: object) -> dict[int, float]:
    if not isinstance(bias, Mapping):
        raise UsageError(f"logit_bias is {bias!r}; expected a mapping of ids to numbers")
    for token, value in bias.items():
        _check_int("logit_bias: id", token, 0)
        if value != -math.inf:
            _check_float(f"logit_bias of id {token}", value, -math.inf, math.inf)
    return {int(token): float(value) for token, value in bias.items()}


def _checked_stop(stop: object) -> tuple[str, ...]:
    texts = (stop,) if isinstance(stop, str) else stop
    if not isinstance(texts, Sequence) or not all(isinstance(t, str) and t for t in texts):
        raise UsageError(f"stop is {stop!r}; expected texts that are not empty")
    return tuple(texts)
