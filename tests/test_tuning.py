"""What ``tune`` finds, with made-up contestants, clocks and rates; and once in earnest."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import pytest
from mla_backend import tuning
from mla_backend.cli import main
from mla_backend.errors import UsageError
from mla_backend.tuned import TunedFile
from mla_backend.tuning import Search

from tests.small_models import small_model


@dataclass
class Machine:
    """Rates by setting, and the time that trials take.

    Attributes:
        decode: tokens per second by threads.
        passes: tokens per second of prefill by the length of passes.
        q8_0: decode with this cache, relative to f16; 0: no such cache.
    """

    decode: dict[int | None, float]
    passes: dict[int, float]
    q8_0: float = 1.0
    n_batch: int = 4096
    seconds: float = 0.0
    log: list[tuple[str, Any, int]] = field(default_factory=list)

    def clock(self) -> float:
        return self.seconds

    def open(self, threads: int | None, cache_type: str) -> Contestant:
        if cache_type == "q8_0" and not self.q8_0:
            raise UsageError("q8_0 does not fit the latent")
        return Contestant(self, threads, cache_type, self.n_batch)

    def search(self, n_ctx: int = 4160, **options: Any) -> Search:
        return Search(self.open, list(self.decode), n_ctx, clock=self.clock, **options)


@dataclass
class Contestant:
    machine: Machine
    threads: int | None
    cache_type: str
    n_batch: int

    def prefill(self, n_tokens: int, n_batch: int) -> float:
        nearest = max((n for n in self.machine.passes if n <= n_batch), default=512)
        return self._took("prefill", n_batch, n_tokens / self.machine.passes[nearest])

    def decode(self, n_tokens: int, depth: int) -> float:
        rate = self.machine.decode[self.threads]
        rate *= self.machine.q8_0 if self.cache_type == "q8_0" else 1.0
        return self._took("decode", self.threads, n_tokens / rate)

    def _took(self, what: str, setting: Any, seconds: float) -> float:
        self.machine.seconds += seconds
        self.machine.log.append((what, setting, round(self.machine.seconds)))
        return seconds


RISING = {512: 4000.0, 1024: 5000.0, 2048: 6000.0, 4096: 6500.0}


def test_the_fastest_wins() -> None:
    machine = Machine({8: 30.0, 14: 40.0, 16: 35.0}, RISING, q8_0=1.2)
    search = machine.search()
    found = search.run()
    assert (found.threads, found.n_batch, found.cache_type) == (14, 4096, "q8_0")
    best = [(trial.what, trial.value) for trial in search.trials if trial.is_best]
    assert best == [("threads", "14"), ("batch", "4096"), ("cache", "q8_0")]
    assert machine.seconds < 120


def test_more_must_be_worth_it() -> None:
    flat = {512: 4000.0, 1024: 4010.0, 2048: 4500.0, 4096: 4520.0}
    found = Machine({4: 10.0}, flat, q8_0=1.01).search().run()
    assert (found.threads, found.n_batch, found.cache_type) == (4, 2048, "f16")


def test_contestants_take_turns() -> None:
    machine = Machine({1: 10.0, 2: 20.0}, RISING)
    machine.search().run()
    decodes = [setting for what, setting, _ in machine.log if what == "decode"]
    assert decodes[:6] == [1, 2, 1, 2, 1, 2]


def test_a_slow_model_ends_in_time() -> None:
    """What cannot be tried is left to memory; the shortest pass is always tried."""
    machine = Machine({8: 1.0, 16: 1.5}, {512: 30.0, 1024: 35.0, 2048: 40.0, 4096: 45.0})
    found = machine.search().run()
    assert found.threads == 16
    assert found.n_batch == 4096
    assert machine.seconds < 150


def test_a_falling_rate_stays_with_short_passes() -> None:
    machine = Machine({2: 10.0}, {512: 100.0, 1024: 80.0, 2048: 70.0, 4096: 60.0})
    assert machine.search().run().n_batch == 512


@pytest.mark.parametrize(("n_ctx", "n_batch"), [(64, 52), (700, 512), (2048, 1024)])
def test_short_contexts(n_ctx: int, n_batch: int) -> None:
    machine = Machine({2: 10.0}, RISING, n_batch=n_ctx)
    search = machine.search(n_ctx)
    search.run()
    tried = [trial.value for trial in search.trials if trial.what == "batch"]
    assert tried[-1] == str(n_batch)


def test_threads_of_nodes_and_no_other_cache() -> None:
    machine = Machine({None: 10.0}, RISING, q8_0=0.0)
    found = machine.search().run()
    assert (found.threads, found.cache_type) == (None, "f16")


def test_progress_rises_to_the_end() -> None:
    seen: list[tuple[str, int, int]] = []
    machine = Machine({1: 10.0, 2: 20.0}, RISING)
    machine.search(on_progress=lambda *report: seen.append(report)).run()
    done = [report[1] for report in seen]
    assert done == sorted(done)
    assert seen[-1][1] == seen[-1][2]


def test_thread_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning._core, "usable_physical_cores", lambda root="": 16)
    monkeypatch.setattr(tuning._core, "usable_cpus", lambda: list(range(32)))
    monkeypatch.setattr(tuning._core, "cpu_quota_cores", lambda root="": None)
    assert tuning.thread_counts() == [8, 12, 15, 16, 32]
    monkeypatch.setattr(tuning._core, "cpu_quota_cores", lambda root="": 16.0)
    assert tuning.thread_counts() == [8, 12, 15, 16]
    monkeypatch.setattr(tuning._core, "usable_physical_cores", lambda root="": 1)
    assert tuning.thread_counts() == [1]


def test_the_command_keeps_what_it_finds(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tuning, "_BATCHES", (16, 32))
    monkeypatch.setattr(tuning, "_REPEATS", 1)
    path = str(small_model(n_layer=1))
    assert main(["tune", path, "--dry-run", "-q"]) == 0
    assert "| threads | " in capsys.readouterr().out
    assert not TunedFile().path.exists()
    assert main(["tune", path, "--json", "-q"]) == 0
    found = json.loads(capsys.readouterr().out)
    stored = TunedFile().find(found["model"])
    assert stored is not None
    assert (stored.threads, stored.n_batch) == (found["threads"], found["n_batch"])
    assert main(["run", path, "-p", "a", "-n", "1", "-v"]) == 0
    assert stored.text in capsys.readouterr().err
    assert main(["run", path, "-p", "a", "-n", "1", "-v", "--no-tuned"]) == 0
    assert stored.text not in capsys.readouterr().err
