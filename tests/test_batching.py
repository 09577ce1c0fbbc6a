"""How prompts are cut into passes, and how long these may be."""

from __future__ import annotations

import pytest
from mla_backend import _core, planning
from mla_backend.batching import pass_sizes
from mla_backend.config import config_from_gguf
from mla_backend.gguf import read_gguf
from mla_backend.model import Model
from mla_backend.planning import automatic_batch

from tests.small_models import small_model


@pytest.mark.parametrize(
    ("n_tokens", "n_batch", "sizes"),
    [
        (1, 4096, [1]),
        (4096, 4096, [4096]),
        (100, 32, [32, 32, 32, 4]),  # short passes are as asked
        (6000, 4096, [4096, 1904]),
        (4100, 4096, [2112, 1988]),
        (8200, 4096, [4096, 2112, 1992]),
        (12288, 4096, [4096, 4096, 4096]),
    ],
)
def test_sizes(n_tokens: int, n_batch: int, sizes: list[int]) -> None:
    assert pass_sizes(n_tokens, n_batch) == sizes


@pytest.mark.parametrize("n_batch", [1, 7, 1023, 1024, 1500, 4096])
def test_sizes_add_up(n_batch: int) -> None:
    for n_tokens in (1, 63, 1024, 1025, 4097, 9001):
        sizes = pass_sizes(n_tokens, n_batch)
        assert sum(sizes) == n_tokens
        assert all(0 < size <= n_batch for size in sizes)
        assert len(sizes) == -(-n_tokens // n_batch)


def test_automatic_batch_follows_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_from_gguf(read_gguf(small_model()))
    most = planning._workspace_estimate(config, 4096)
    left = [100 * most]
    monkeypatch.setattr(_core, "available_memory_bytes", lambda root="": left[0])
    assert automatic_batch(config, 1 << 20, held_bytes=0) == 4096
    assert automatic_batch(config, 777, held_bytes=0) == 777
    left[0] = 3 * most
    assert automatic_batch(config, 1 << 20, held_bytes=0) == 2048
    assert automatic_batch(config, 1 << 20, held_bytes=2 * most) == 1024
    left[0] = 0  # loading tells what is missing
    assert automatic_batch(config, 1 << 20, held_bytes=most) == 512


def test_progress_amid_a_pass() -> None:
    """Reports rise to the last token, in steps of a pass that takes long enough."""
    seen: list[tuple[str, int, int]] = []
    with Model.load(small_model(), n_ctx=4096, threads=1, attention="absorbed") as model:
        assert model.n_batch == 4096
        ids = [1 + i % 100 for i in range(4000)]
        model.session().feed(ids, on_progress=lambda *report: seen.append(report))
    assert seen[0] == ("prefill", 0, 4000)
    assert seen[-1] == ("prefill", 4000, 4000)
    done = [report[1] for report in seen]
    assert done == sorted(done)


def test_what_progress_raises_stops_the_pass() -> None:
    class StopError(Exception):
        pass

    def stop(phase: str, done: int, total: int) -> None:
        if done > 0:
            raise StopError

    with Model.load(small_model(), n_ctx=4096, threads=1) as model:
        session = model.session()
        with pytest.raises(StopError):
            session.feed([1] * 3000, on_progress=stop)
        session.truncate(0)
        assert len(session.feed([1, 2, 3])) == 1
