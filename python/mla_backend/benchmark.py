"""Rates of a loaded model: prefill and decode, by depth, beside what the machine can do."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, Protocol, TypedDict

import numpy as np

from mla_backend.attention_mode import MODES, AttentionMode
from mla_backend.batching import pass_sizes
from mla_backend.cost import CostModel, Pass
from mla_backend.devices import cuda_module
from mla_backend.energy import EnergyMeter
from mla_backend.errors import ContextError, UsageError
from mla_backend.limits import Limits, cpu_limits, gpu_limits
from mla_backend.nvml import Gpu, find_gpu
from mla_backend.placement import CPU

if TYPE_CHECKING:
    from mla_backend.model import Model
    from mla_backend.session import Session

Progress = Callable[[str, int, int], None]
Phase = Literal["prefill", "decode"]

OURS: Final = "mla_backend"
#: Ratios are to the first.
SWEEP_MODES: Final[Sequence[AttentionMode]] = ("auto", "absorbed", "expanded")
#: Single tokens fed before a decode is timed: graphs are recorded when they run a second time.
WARM_UP_TOKENS: Final = 4
#: Decoding ends early after this long: expanded attention at great depth takes seconds a token.
_DECODE_SECONDS: Final = 10.0
#: Tokens between two looks at the clock.
_DECODE_SLICE: Final = 4
_MOST_TOKENS: Final = 1 << 30


class BenchResult(TypedDict):
    """What ``Model.bench`` returns; None where a part was not measured or cannot be known.

    Attributes:
        prefill_tps, decode_tps: tokens per second, the median of the repeats.
        prefill_spread, decode_spread: (slowest - fastest) / median of the seconds.
        prefill_attention, decode_attention: "absorbed", "expanded", or "absorbed+expanded".
        read_gbps: 1e9 bytes per second that decoding cannot avoid reading.
        tops: 1e12 operations per second of prefill, two per multiply-add.
        limit_read_gbps, limit_tops: what the machine can do at best; see ``Limits``.
        prefill_joules_per_token, decode_joules_per_token: of the processors that tell it, all
            programs on them included.
        n_prompt, n_gen, depth, repeats, n_threads: what was asked for.
    """

    prefill_tps: float | None
    decode_tps: float | None
    prefill_spread: float | None
    decode_spread: float | None
    prefill_attention: str | None
    decode_attention: str | None
    read_gbps: float | None
    tops: float | None
    limit_read_gbps: float | None
    limit_tops: float | None
    prefill_joules_per_token: float | None
    decode_joules_per_token: float | None
    n_prompt: int
    n_gen: int
    depth: int
    repeats: int
    n_threads: int


@dataclass(frozen=True)
class Measurement:
    """One phase of one program at one depth; None where it cannot be known.

    Attributes:
        mode: the attention asked for; None for peers.
        attention: what it came to: "absorbed", "expanded", or "absorbed+expanded".
        n_tokens: fed in one run.
        depth: positions cached before.
        tps: tokens per second, the median of the runs.
        spread: (slowest - fastest) / median.
        read_gbps, tops: 1e9 bytes and 1e12 operations per second that cannot be avoided.
        read_share, tops_share: of the machine's limits.
        roofline_share: ``tps`` over what the limits allow.
        joules_per_token: of the processors that tell it.
        ratio: our rate over this one, in the same mode as the first of our programs.
    """

    phase: Phase
    program: str
    mode: AttentionMode | None
    attention: str | None
    n_tokens: int
    depth: int
    tps: float
    spread: float
    read_gbps: float
    tops: float
    read_share: float | None
    tops_share: float | None
    roofline_share: float | None
    joules_per_token: float | None
    ratio: float


@dataclass(frozen=True)
class Cases:
    """What is measured: every prompt length and the decoding at every depth."""

    n_prompts: Sequence[int]
    n_gen: int
    depths: Sequence[int]
    repeats: int = 3

    def __post_init__(self) -> None:
        """Raise UsageError for numbers out of range."""
        for name, values, least in (
            ("n_prompt", self.n_prompts, 0),
            ("n_gen", [self.n_gen], 0),
            ("depth", self.depths, 0),
            ("repeats", [self.repeats], 1),
        ):
            for value in values:
                if not hasattr(value, "__index__") or not least <= value <= _MOST_TOKENS:
                    raise UsageError(f"{name} {value!r}; accepted is {least} or more")
        if not any(self.n_prompts) and not self.n_gen:
            raise UsageError("n_prompt and n_gen are 0: there is nothing to measure")

    @property
    def n_ctx(self) -> int:
        """Positions that they take."""
        longest = max(*self.n_prompts, self.n_gen + WARM_UP_TOKENS, 0)
        return max(self.depths) + longest

    def runs(self) -> Iterator[tuple[int, Phase, int]]:
        """(depth, phase, tokens), in the order in which they are measured."""
        for depth in sorted(set(self.depths)):
            yield from ((depth, "prefill", n) for n in dict.fromkeys(self.n_prompts) if n)
            if self.n_gen:
                yield depth, "decode", self.n_gen


class Program(Protocol):
    """What can be fed tokens and timed."""

    @property
    def name(self) -> str:
        """With its version, where it is not ours."""

    def feed(self, ids: Sequence[int], *, keep: int, one_by_one: bool = False) -> float:
        """Go back to ``keep`` positions and feed ``ids``; returns seconds."""


class OurProgram:
    """A session in one mode of attention. Programs of several modes may share one session."""

    name = OURS

    def __init__(self, session: Session, mode: AttentionMode) -> None:
        self.mode: AttentionMode = mode
        self._session = session

    def feed(self, ids: Sequence[int], *, keep: int, one_by_one: bool = False) -> float:
        """See ``Program``."""
        session = self._session
        session.attention = self.mode
        session.truncate(keep)
        start = time.perf_counter()
        if one_by_one:
            for token in ids:  # as generation does it: candidates are enough
                session.step(token, lambda _: True)
        else:
            session.feed(ids)
        return time.perf_counter() - start


class Bench:
    """Measures one model, and peers on the same file in turns with it.

    Attributes:
        devices: that layers, experts or the output lie on: "cpu", "cuda:0".
        limits: of the device, where it is one and something is known of it.
        meter: its ``sources`` say what is counted.
        notes: what was left out, and why.
        load_average: processes that wanted a CPU in the minute before; others' work costs rates.
    """

    def __init__(self, model: Model, peers: Sequence[Program] = ()) -> None:
        self._model = model
        self._peers = list(peers)
        self.load_average = os.getloadavg()[0]
        self._costs = CostModel(model.file, model.config, model.cache_type, model.attention_isa)
        placement = model.placement
        self.devices = sorted({placement.of(name) for name in model.file.tensors})
        gpus = {name: _find_gpu(name) for name in self.devices if name != CPU}
        self.meter = EnergyMeter([gpu for gpu in gpus.values() if gpu is not None])
        self.limits = self._find_limits(gpus)
        self.notes = _notes(self.limits, self.meter, on_gpu=bool(gpus))

    def _find_limits(self, gpus: dict[str, Gpu | None]) -> Limits | None:
        if len(self.devices) > 1:
            return None
        if not gpus:
            return cpu_limits(self._model.isa, self._model.n_threads)
        ((name, gpu),) = gpus.items()
        return gpu_limits(name, gpu) if gpu is not None else None

    def measure(
        self,
        cases: Cases,
        modes: Sequence[AttentionMode] | None = None,
        on_progress: Progress | None = None,
    ) -> list[Measurement]:
        """All cases in all modes of attention (None: as the model was loaded), then the peers.

        Raises UsageError, ContextError where the model's context is too short, and what peers
        raise.
        """
        for mode in modes or ():
            if mode not in MODES:
                raise UsageError(f"attention {mode!r}; accepted are {', '.join(MODES)}")
        if cases.n_ctx > self._model.n_ctx:
            raise ContextError(
                f"{cases.n_ctx} positions are measured; the context is of {self._model.n_ctx}"
            )
        # Random ids spread over the experts as text does; the last of a vocabulary mean things.
        draw = np.random.default_rng(0)
        n_ids = cases.n_ctx + max(*cases.n_prompts, cases.n_gen, 0) * cases.repeats
        ids = draw.integers(0, max(self._model.config.n_vocab // 2, 1), n_ids).tolist()
        with self._model.own_session() as session:
            ours = [OurProgram(session, mode) for mode in modes or (session.attention,)]
            return list(self._run(cases, ours, ids, on_progress))

    def _run(
        self, cases: Cases, ours: Sequence[OurProgram], ids: list[int], on_progress: Progress | None
    ) -> Iterator[Measurement]:
        programs: list[Program] = [*ours, *self._peers]
        runs = list(cases.runs())
        done, total = 0, len(runs) * cases.repeats * len(programs)
        filled = 0
        for depth, phase, n_tokens in runs:
            if depth > filled:  # the modes of attention leave the same numbers in their cache
                for program in (ours[0], *self._peers):
                    program.feed(ids[filled:depth], keep=filled)
                filled = depth
            clock = _Clock(self.meter, phase, depth)
            if phase == "prefill":
                for program in programs:
                    self._warm_up(program, depth, ids[depth : depth + n_tokens])
            taken: list[list[_Taken]] = [[] for _ in programs]
            for repeat in range(cases.repeats):
                begin = depth + repeat * n_tokens
                for runs_of, program in zip(taken, programs, strict=True):
                    # One that was stopped at the time limit is repeated with as many tokens.
                    n = runs_of[0].n_tokens if runs_of else n_tokens
                    runs_of.append(clock.time(program, ids[begin : begin + n]))
                    done += 1
                    if on_progress is not None:
                        on_progress("bench", done, total)
            yield from self._judge(phase, depth, programs, taken)

    def _warm_up(self, program: Program, depth: int, ids: list[int]) -> None:
        """Plans are made and pages come in: of a whole chunk, and of the last, which has logits.

        Devices record what runs a second time.
        """
        sizes = pass_sizes(len(ids), self._model.n_batch)
        evened = len(sizes) > 2 and sizes[-2] != sizes[0]
        n_tokens = sum(sizes[-3 if evened else -2 :])
        for _ in range(1 if self.devices == [CPU] else 2):
            program.feed(ids[:n_tokens], keep=depth)

    def _judge(
        self,
        phase: Phase,
        depth: int,
        programs: Sequence[Program],
        taken: Sequence[Sequence[_Taken]],
    ) -> Iterator[Measurement]:
        first = statistics.median(run.seconds_per_token for run in taken[0])
        for program, runs in zip(programs, taken, strict=True):
            mode = program.mode if isinstance(program, OurProgram) else None
            n_tokens = runs[0].n_tokens
            least = self._least(phase, n_tokens, depth, mode or "auto")
            yield _measurement(phase, program.name, mode, depth, least, runs, self.limits, first)

    def _least(self, phase: Phase, n_tokens: int, depth: int, mode: AttentionMode) -> Pass:
        if phase == "decode":
            return self._costs.decode(n_tokens, depth, mode)
        return self._costs.prefill(n_tokens, depth, self._model.n_batch, mode)


@dataclass(frozen=True)
class _Taken:
    """What one run took."""

    n_tokens: int
    seconds: float
    joules: float | None

    @property
    def seconds_per_token(self) -> float:
        return self.seconds / self.n_tokens


@dataclass(frozen=True)
class _Clock:
    """Times runs of one phase at one depth."""

    meter: EnergyMeter
    phase: Phase
    depth: int

    def time(self, program: Program, ids: list[int]) -> _Taken:
        if self.phase == "decode":
            # Each time: caches hold what the program before has left.
            program.feed((ids * WARM_UP_TOKENS)[:WARM_UP_TOKENS], keep=self.depth, one_by_one=True)
        before = self.meter.read_j()
        if self.phase == "prefill":
            n_tokens, seconds = len(ids), program.feed(ids, keep=self.depth)
        else:
            n_tokens, seconds = self._decode(program, ids)
        after = self.meter.read_j()
        joules = None if before is None or after is None else after - before
        return _Taken(n_tokens, max(seconds, 1e-9), joules)

    def _decode(self, program: Program, ids: list[int]) -> tuple[int, float]:
        seconds, n_done = 0.0, 0
        while n_done < len(ids) and seconds < _DECODE_SECONDS:
            part = ids[n_done : n_done + _DECODE_SLICE]
            seconds += program.feed(part, keep=self.depth + n_done, one_by_one=True)
            n_done += len(part)
        return n_done, seconds


def _measurement(
    phase: Phase,
    program: str,
    mode: AttentionMode | None,
    depth: int,
    least: Pass,
    runs: Sequence[_Taken],
    limits: Limits | None,
    first: float,
) -> Measurement:
    per_token = [run.seconds_per_token for run in runs]
    middle = statistics.median(per_token)
    read_gbps = least.n_bytes / least.n_tokens / middle / 1e9
    tops = least.n_ops / least.n_tokens / middle / 1e12
    joules = [run.joules / run.n_tokens for run in runs if run.joules is not None]
    read_limit = limits.read_gbps if limits else 0.0
    tops_limit = limits.tops if limits else 0.0
    roofline = (
        least.seconds(read_limit, tops_limit) / least.n_tokens / middle
        if read_limit and tops_limit
        else None
    )
    return Measurement(
        phase=phase,
        program=program,
        mode=mode,
        attention="+".join(sorted(least.contractions)) if mode else None,
        n_tokens=least.n_tokens,
        depth=depth,
        tps=1 / middle,
        spread=(max(per_token) - min(per_token)) / middle,
        read_gbps=read_gbps,
        tops=tops,
        read_share=read_gbps / read_limit if read_limit else None,
        tops_share=tops / tops_limit if tops_limit else None,
        roofline_share=roofline,
        joules_per_token=statistics.median(joules) if joules else None,
        ratio=middle / first,
    )


def bench(
    model: Model,
    n_prompt: int,
    n_gen: int,
    depth: int,
    *,
    attention: AttentionMode | None = None,
    repeats: int = 3,
    on_progress: Progress | None = None,
) -> BenchResult:
    """See ``Model.bench``."""
    cases = Cases([n_prompt], n_gen, [depth], repeats)
    machine = Bench(model)
    modes = None if attention is None else [attention]
    found = {m.phase: m for m in machine.measure(cases, modes, on_progress)}
    prefill, decode = found.get("prefill"), found.get("decode")
    limits = machine.limits
    return BenchResult(
        prefill_tps=prefill.tps if prefill else None,
        decode_tps=decode.tps if decode else None,
        prefill_spread=prefill.spread if prefill else None,
        decode_spread=decode.spread if decode else None,
        prefill_attention=prefill.attention if prefill else None,
        decode_attention=decode.attention if decode else None,
        read_gbps=decode.read_gbps if decode else None,
        tops=prefill.tops if prefill else None,
        limit_read_gbps=(limits.read_gbps or None) if limits else None,
        limit_tops=(limits.tops or None) if limits else None,
        prefill_joules_per_token=prefill.joules_per_token if prefill else None,
        decode_joules_per_token=decode.joules_per_token if decode else None,
        n_prompt=n_prompt,
        n_gen=n_gen,
        depth=depth,
        repeats=repeats,
        n_threads=model.n_threads,
    )


def _find_gpu(name: str) -> Gpu | None:
    """The GPU of a device's name; None where the driver's library does not know it."""
    module, number = cuda_module(), int(name.partition(":")[2] or 0)
    if module is None or number >= module.device_count():
        return None
    return find_gpu(number, module.device_info(number)["name"])


def _notes(limits: Limits | None, meter: EnergyMeter, *, on_gpu: bool) -> list[str]:
    notes = [meter.problem] if meter.problem and not meter.sources else []
    if limits is None:
        notes.append("limits: layers lie on several devices, or the driver tells nothing of them")
    elif not limits.is_measured:
        notes.append("limits: memory by its clock and width; operations are not known")
    if on_gpu and meter.sources and meter.problem:
        notes.append(f"{meter.problem}: the GPU alone is counted")
    return notes
