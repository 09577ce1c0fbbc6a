"""How well a model guesses a text, and how far it is from another one."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Protocol

import numpy as np

from mla_backend.chunks import Chunks, Progress
from mla_backend.errors import UsageError
from mla_backend.likelihood import F32, F64, Divergence, diverge, join, token_losses
from mla_backend.logits_file import LogitsFile, LogitsWriter
from mla_backend.model import Model

#: Percentiles of the divergence that are reported.
PERCENTILES: Final = (99.9, 99.0, 95.0, 90.0, 75.0, 50.0, 25.0, 10.0, 5.0, 1.0)


@dataclass(frozen=True)
class Estimate:
    """A mean over tokens, and its standard error."""

    value: float
    error: float


@dataclass(frozen=True)
class Perplexity:
    """How well a text was guessed.

    Attributes:
        perplexity: e to the mean of -log p.
        n_tokens: tokens guessed.
    """

    perplexity: Estimate
    n_tokens: int


@dataclass(frozen=True)
class Comparison:
    """A model beside a base model, on the same tokens.

    Attributes:
        perplexity, base_perplexity: of either.
        log_ratio: of the perplexities, logarithm of the model's over the base's.
        kl: divergence of the model from the base, nats per token.
        kl_percentiles: by percentage; 50 is the median. kl_max: the largest.
        same_top: share of tokens where both find the same one likeliest.
    """

    perplexity: Estimate
    base_perplexity: Estimate
    log_ratio: Estimate
    kl: Estimate
    kl_percentiles: dict[float, float]
    kl_max: float
    same_top: Estimate
    n_tokens: int


class Reference(Protocol):
    """Where the logits (or log-probabilities) of the base come from."""

    def rows(self, index: int) -> F32:
        """Of the scored tokens of a chunk, [T, V]."""


class ModelLogits:
    """A model's logits of chunks; each is read in a fresh context.

    Raises MemoryLimitError where another cache does not fit.
    """

    def __init__(self, model: Model, chunks: Chunks) -> None:
        self._session = model.session(chunks.n_ctx)
        self._chunks = chunks

    def rows(self, index: int) -> F32:
        """Of the scored tokens of a chunk, float32 [T, V]."""
        chunks = self._chunks
        self._session.truncate(0)
        wanted = chunks.n_ctx - chunks.first_scored
        return self._session.feed(chunks.fed[index].tolist(), outputs=wanted)[:-1]

    def __enter__(self) -> ModelLogits:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._session.close()


class SavedLogits:
    """Those of a file. Raises UsageError where it was made from other chunks."""

    def __init__(self, file: LogitsFile, chunks: Chunks, n_vocab: int) -> None:
        file.check(chunks, n_vocab)
        self._file = file

    def rows(self, index: int) -> F32:
        """Of the scored tokens of a chunk, float32 [T, V]."""
        return self._file.log_probs(index)


def measure(
    model: Model,
    chunks: Chunks,
    *,
    save_logits: Path | None = None,
    on_progress: Progress | None = None,
) -> Perplexity:
    """Perplexity over the second halves of all chunks.

    Args:
        save_logits: also write log-probabilities to this file, for ``compare``.
        on_progress: called as ("text", tokens done, tokens in all).

    Raises OSError where the file cannot be written, MemoryLimitError.
    """
    losses = []
    with ExitStack() as stack:
        logits = stack.enter_context(ModelLogits(model, chunks))
        writer = None
        if save_logits is not None:
            writer = stack.enter_context(LogitsWriter(save_logits, chunks, model.config.n_vocab))
        for index in range(len(chunks)):
            _report(on_progress, chunks, index)
            rows = logits.rows(index)
            losses.append(token_losses(rows, chunks.targets(index)))
            if writer is not None:
                writer.add(rows)
        _report(on_progress, chunks, len(chunks))
    joined = np.concatenate(losses)
    return Perplexity(_perplexity(joined), len(joined))


def compare(
    model: Model, base: Reference, chunks: Chunks, *, on_progress: Progress | None = None
) -> Comparison:
    """A model beside a base over the second halves of all chunks.

    Progress and errors as in ``measure``; UsageError where the vocabularies differ.
    """
    parts: list[Divergence] = []
    with ModelLogits(model, chunks) as logits:
        for index in range(len(chunks)):
            _report(on_progress, chunks, index)
            expected, found = base.rows(index), logits.rows(index)
            if expected.shape != found.shape:
                raise UsageError(
                    f"the reference has a vocabulary of {expected.shape[1]}, the model one of "
                    f"{found.shape[1]}; accepted: equal ones"
                )
            parts.append(diverge(expected, found, chunks.targets(index)))
    _report(on_progress, chunks, len(chunks))
    return _summary(join(parts))


def check_vocabulary(model: Model, base: Model) -> None:
    """Raise UsageError where ids mean other tokens to the base: its text would be another one."""
    key = "tokenizer.ggml.tokens"
    ours, theirs = model.file.metadata.get(key), base.file.metadata.get(key)
    if not isinstance(ours, tuple) or not isinstance(theirs, tuple) or ours == theirs:
        return
    if len(ours) != len(theirs):
        found = f"a vocabulary of {len(theirs)} tokens, the model one of {len(ours)}"
    else:
        at = next(i for i, pair in enumerate(zip(ours, theirs, strict=True)) if len(set(pair)) > 1)
        found = f"token {at} as {theirs[at]!r}, the model as {ours[at]!r}"
    raise UsageError(f"the reference has {found}; accepted: equal vocabularies")


def _summary(tokens: Divergence) -> Comparison:
    percentiles = np.percentile(tokens.kl, PERCENTILES)
    return Comparison(
        perplexity=_perplexity(tokens.losses),
        base_perplexity=_perplexity(tokens.base_losses),
        log_ratio=_mean(tokens.losses - tokens.base_losses),
        kl=_mean(tokens.kl),
        kl_percentiles=dict(zip(PERCENTILES, map(float, percentiles), strict=True)),
        kl_max=float(tokens.kl.max()),
        same_top=_mean(tokens.same_top.astype(np.float64)),
        n_tokens=len(tokens.kl),
    )


def _mean(values: F64) -> Estimate:
    spread = float(values.std(ddof=1)) if len(values) > 1 else 0.0
    return Estimate(float(values.mean()), spread / math.sqrt(len(values)))


def _perplexity(losses: F64) -> Estimate:
    loss = _mean(losses)
    value = float(np.exp(loss.value))
    return Estimate(value, value * loss.error)


def _report(on_progress: Progress | None, chunks: Chunks, done: int) -> None:
    if on_progress is not None:
        on_progress("text", done * chunks.n_ctx, chunks.fed.size)
