"""The generation loop: prompt in, typed chunks of text out."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from mla_backend._core import CancelToken
from mla_backend.candidates import LogitsRow
from mla_backend.errors import CancelledError, ContextError, UsageError
from mla_backend.sampling import LogitsProcessor, Sampled, Sampler, SamplingParams
from mla_backend.session import Session
from mla_backend.stops import StopScanner
from mla_backend.tokenizer import Tokenizer

FinishReason = Literal["stop", "length", "cancelled"]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Stats:
    """Counts of tokens and seconds.

    Attributes:
        n_prompt: tokens of the prompt; ``n_reused`` of them were in the cache already.
        n_generated: tokens sampled.
    """

    n_prompt: int
    n_reused: int
    n_generated: int
    prompt_seconds: float
    generation_seconds: float

    def one_more(self, generation_seconds: float) -> Stats:
        """These after another token."""
        return Stats(
            self.n_prompt,
            self.n_reused,
            self.n_generated + 1,
            self.prompt_seconds,
            generation_seconds,
        )

    @property
    def prompt_tps(self) -> float:
        """Prompt tokens computed per second."""
        return _rate(self.n_prompt - self.n_reused, self.prompt_seconds)

    @property
    def generation_tps(self) -> float:
        """Tokens per second after the first, which the prompt's pass yields."""
        return _rate(self.n_generated - 1, self.generation_seconds)


def _rate(count: int, seconds: float) -> float:
    return count / seconds if count > 0 and seconds > 0 else 0.0


@dataclass(frozen=True)
class Chunk:
    """One step of a stream.

    Attributes:
        text: what became certain; empty while a character or a stop string is incomplete.
        token: its id; None where a chunk only closes the stream.
        logprob: natural logarithm of its probability, unmodified by the sampling parameters.
        top_logprobs: the likeliest (id, logprob), as many as ``logprobs`` asks for.
        finish_reason: on the last chunk: "stop" (end token or stop string), "length"
            (``max_tokens`` or the context), "cancelled".
    """

    text: str
    token: int | None
    logprob: float | None
    top_logprobs: tuple[tuple[int, float], ...]
    finish_reason: FinishReason | None
    stats: Stats


@dataclass(frozen=True)
class Completion:
    """A whole answer; see Chunk for the fields."""

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...]
    finish_reason: FinishReason
    stats: Stats


@dataclass(frozen=True)
class GenerationOptions:
    """How to go on from a prompt.

    Attributes:
        max_tokens: None is until the model ends or the context is full; 0 only reads the prompt.
        sampling: see SamplingParams, stop strings and logprobs included.
        logits_processors: called as f(ids, logits) before each choice.
        ignore_eos: end tokens do not end the answer (for measurements).
        cancel: ends the answer within a layer, from any thread; what was computed is kept.
        on_progress: called as ("prefill", tokens done, tokens in all) after every chunk.
    """

    max_tokens: int | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    logits_processors: Sequence[LogitsProcessor] = ()
    ignore_eos: bool = False
    cancel: CancelToken | None = None
    on_progress: Progress | None = None

    def __post_init__(self) -> None:
        limit = self.max_tokens
        if limit is not None and (not hasattr(limit, "__index__") or limit < 0):
            raise UsageError(f"max_tokens {limit!r}; accepted are None and integers from 0")
        if not isinstance(self.cancel, CancelToken | None):
            raise UsageError(f"cancel {self.cancel!r}; accepted are None and a CancelToken")


def check_prompt(prompt: Sequence[int], n_ctx: int) -> None:
    """Raise UsageError for an empty prompt, ContextError for one longer than ``n_ctx``."""
    if not prompt:
        raise UsageError("the prompt is empty; give at least one token")
    if len(prompt) > n_ctx:
        raise ContextError(f"the prompt of {len(prompt)} tokens exceeds the context of {n_ctx}")


def stream(
    session: Session, tokenizer: Tokenizer, prompt: Sequence[int], options: GenerationOptions
) -> Generator[Chunk, None, None]:
    """Continue ``prompt`` in ``session``; a prefix that the session holds is not computed again.

    Raises, before computing, UsageError for an empty prompt and ContextError for one too long.
    """
    check_prompt(prompt, session.n_ctx)
    if options.sampling.stop and not tokenizer.can_decode:
        raise UsageError("stop strings need text, and the file's tokenizer is not known here")
    return _Generation(session, tokenizer, list(prompt), options).run()


def complete(chunks: Iterator[Chunk]) -> Completion:
    """Drain a stream."""
    seen = list(chunks)
    tokens = [chunk for chunk in seen if chunk.token is not None]
    last = seen[-1]
    return Completion(
        text="".join(chunk.text for chunk in seen),
        tokens=tuple(chunk.token for chunk in tokens if chunk.token is not None),
        logprobs=tuple(chunk.logprob for chunk in tokens if chunk.logprob is not None),
        top_logprobs=tuple(chunk.top_logprobs for chunk in tokens),
        finish_reason=last.finish_reason or "stop",
        stats=last.stats,
    )


class _Generation:
    """The state of one stream."""

    def __init__(
        self,
        session: Session,
        tokenizer: Tokenizer,
        prompt: list[int],
        options: GenerationOptions,
    ) -> None:
        self._session = session
        self._prompt = prompt
        self._options = options
        self._end_ids = frozenset() if options.ignore_eos else tokenizer.eos_ids
        # Without a known tokenizer there are ids and no text.
        self._decoder = (
            tokenizer.stream_decoder(skip_special=True) if tokenizer.can_decode else None
        )
        self._stops = StopScanner(options.sampling.stop)
        self._sampler = Sampler(options.sampling, options.logits_processors)
        goes_on = prompt[: len(session.tokens)] == session.tokens
        if goes_on and session.sampler_state is not None and options.sampling.seed is None:
            self._sampler.restore(session.sampler_state)
        self._stats = Stats(len(prompt), session.reuse(prompt), 0, 0.0, 0.0)

    def run(self) -> Generator[Chunk, None, None]:
        options, session = self._options, self._session
        limit = session.n_ctx - len(self._prompt)
        if options.max_tokens is not None:
            limit = min(limit, options.max_tokens)
        started = time.perf_counter()
        try:
            logits: LogitsRow = session.feed_prompt(
                self._prompt[self._stats.n_reused :],
                cancel=options.cancel,
                on_progress=options.on_progress,
            )
            self._stats = replace(self._stats, prompt_seconds=time.perf_counter() - started)
            started = time.perf_counter()
            while self._stats.n_generated < limit:
                sampled = self._sampler.sample(logits, session.tokens)
                session.sampler_state = self._sampler.state()
                self._stats = self._stats.one_more(time.perf_counter() - started)
                chunk = self._chunk(sampled, last=self._stats.n_generated == limit)
                yield chunk
                if chunk.finish_reason is not None:
                    return
                logits = session.step(sampled.token, self._sampler.enough, cancel=options.cancel)
            yield self._closing("length")
        except CancelledError:
            yield self._closing("cancelled")

    def _chunk(self, sampled: Sampled, *, last: bool) -> Chunk:
        reason: FinishReason | None = None
        if sampled.token in self._end_ids:
            text, reason = self._rest(), "stop"
        else:
            piece = self._decoder.push(sampled.token) if self._decoder is not None else ""
            text = self._stops.push(piece)
            if self._stops.found:
                reason = "stop"
            elif last:
                text, reason = text + self._rest(), "length"
        return Chunk(
            text, sampled.token, sampled.logprob, sampled.top_logprobs, reason, self._stats
        )

    def _closing(self, reason: FinishReason) -> Chunk:
        return Chunk(self._rest(), None, None, (), reason, self._stats)

    def _rest(self) -> str:
        end = self._decoder.flush() if self._decoder is not None else ""
        return self._stops.push(end) + self._stops.flush()
