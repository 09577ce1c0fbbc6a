"""How many threads compute, and in what passes, where nobody says."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from mla_backend import _core
from mla_backend.config import ModelConfig
from mla_backend.gguf import TensorInfo
from mla_backend.numa import NumaPlan
from mla_backend.tuned import TunedFile, model_key

#: Memory read by the probe, beyond most caches. All in all it takes a quarter of a second.
_READ_BYTES: Final = 64 << 20
_N_TURNS: Final = 2
_N_REPEATS: Final = 2
#: A second thread of a core must bring this much: it takes power, and room in the caches.
_GAIN: Final = 1.05


@dataclass(frozen=True)
class ThreadChoice:
    """A number of threads, and why it is that one."""

    n_threads: int
    reason: str


@dataclass(frozen=True)
class Defaults:
    """What a model is computed with unless the user says otherwise.

    Attributes:
        threads: None: the cores of the nodes that keep its weights.
        n_batch: None: as memory allows; else no more than this.
        text: why, in one line.
        problem: of the file of tuned settings, for the user; "" where there is none.
        by_nodes: whether threads stay on the nodes that keep weights.
    """

    threads: int | None
    n_batch: int | None
    text: str
    problem: str = ""
    by_nodes: bool = False


def choose_defaults(
    config: ModelConfig,
    infos: Mapping[str, TensorInfo],
    nodes: NumaPlan,
    *,
    threads: int | None,
    tuned: bool,
) -> Defaults:
    """``threads`` as asked; else what ``tune`` found for such a model here; else by the machine."""
    known = TunedFile() if tuned else None
    problem = known.problem if known is not None else ""
    found = known.find(model_key(config, infos.values())) if known is not None else None
    n_batch = found.n_batch if found is not None else None
    if threads is not None:
        return Defaults(threads, n_batch, "as asked", problem, nodes.confines_threads)
    if nodes.confines_threads:
        return Defaults(None, n_batch, "one per core of the nodes", problem, by_nodes=True)
    if found is not None and found.threads is not None:
        return Defaults(found.threads, n_batch, found.text, problem)
    choice = choose_threads(known)
    return Defaults(choice.n_threads, n_batch, choice.reason, problem)


def choose_threads(
    known: TunedFile | None = None, measure: Callable[[int], float] | None = None
) -> ThreadChoice:
    """One thread per physical core, or per hardware thread where a quick probe says that this pays.

    Args:
        known: where the machine's last probe is kept. Without it nothing is probed.
        measure: threads -> a rate.
    """
    cores, cpus = _core.usable_physical_cores(), len(_core.usable_cpus())
    quota = _core.cpu_quota_cores()
    if quota is not None and math.ceil(quota) <= cores:
        return ThreadChoice(cores, f"the control group's quota is of {quota:g} cores")
    if cpus == cores or known is None:
        return ThreadChoice(cores, "one per physical core")
    if known.threads in (cores, cpus):
        return _by_probe(known.threads, cores, "an earlier probe")
    rates = _probe([cores, cpus], measure or _rate)
    chosen = cpus if rates[1] >= _GAIN * rates[0] else cores
    try:
        known.store_threads(chosen)
    except OSError:  # the next process probes again
        return _by_probe(chosen, cores, "a probe, which could not be stored")
    return _by_probe(chosen, cores, "a probe")


def _by_probe(n_threads: int | None, cores: int, who: str) -> ThreadChoice:
    per = "physical core" if n_threads == cores else "hardware thread"
    return ThreadChoice(n_threads or cores, f"one per {per}: {who} found that fastest")


def _probe(counts: list[int], measure: Callable[[int], float]) -> list[float]:
    """The best rate of each, in turns: what disturbs one disturbs the other."""
    best = [0.0] * len(counts)
    for _ in range(_N_TURNS):
        best = [max(rate, measure(n)) for rate, n in zip(best, counts, strict=True)]
    return best


def _rate(n_threads: int) -> float:
    """Decoding reads, prefill multiplies: the geometric mean of both rates."""
    backend = _core.CpuBackend(_core.ThreadPool(n_threads))
    peak = backend.measure_peak(_READ_BYTES, _N_REPEATS)
    ops = max(peak["int8_ops"], peak["bf16_ops"], peak["f32_ops"])
    return math.sqrt(peak["read_bytes"] * ops)
