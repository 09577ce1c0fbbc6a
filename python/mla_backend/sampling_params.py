"""How to choose tokens: the parameters of sampling and their checks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from .errors import UsageError

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
