"""What fits in memory, what is refused, and what the user is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from mla_backend import Model, _core
from mla_backend.cache import BLOCK_CELLS, bytes_per_position
from mla_backend.config import ModelConfig, config_from_gguf
from mla_backend.errors import MemoryLimitError, UsageError
from mla_backend.gguf import read_gguf
from mla_backend.memory import (
    MemoryReport,
    active_weight_bytes,
    check_memory,
    choose_context,
    oversize_note,
)
from small_models import small_model

MIB = 1 << 20


@pytest.fixture(scope="module")
def path() -> Path:
    return small_model("tiny-v2", "q8_0", n_layer=2)


@pytest.fixture(scope="module")
def config(path: Path) -> ModelConfig:
    return config_from_gguf(read_gguf(path))


@pytest.fixture
def available(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes the machine have this many bytes left."""

    def set(n_bytes: int) -> None:
        monkeypatch.setattr(_core, "available_memory_bytes", lambda root="": n_bytes)

    return set


def report(copied: int = 0, cache: int = 0, workspace: int = 0) -> MemoryReport:
    return MemoryReport(10**12, copied, cache, 0, workspace)


def test_anonymous_memory_is_limited_by_its_sum(available: Any) -> None:
    available(100 * MIB)
    check_memory(report(50 * MIB, 30 * MIB, 20 * MIB), cache_in_file=False)
    with pytest.raises(
        MemoryLimitError,
        match=r"0\.11 GiB of memory needed \(cache 0\.04 \+ workspace 0\.02 \+ copied weights "
        r"0\.05\), 0\.10 GiB available; a smaller n_ctx",
    ):
        check_memory(report(50 * MIB, 40 * MIB, 20 * MIB), cache_in_file=False)
    check_memory(report(50 * MIB, 400 * MIB, 20 * MIB), cache_in_file=True)


def test_context_as_asked(config: ModelConfig, available: Any) -> None:
    available(0)
    choice = choose_context(config, 100, "f16", 10**9, cache_in_file=False)
    assert (choice.n_ctx, choice.note) == (100, None)


def test_context_as_trained(config: ModelConfig, available: Any) -> None:
    available(1 << 40)
    choice = choose_context(config, None, "f16", 10**9, cache_in_file=False)
    assert choice.n_ctx == config.n_ctx_train == 10240
    assert choice.note == "context: 10240 positions, the trained length"


def test_context_that_memory_allows(config: ModelConfig, available: Any) -> None:
    each = bytes_per_position(config, "f16")
    weights = 20 * MIB
    available(weights + 5000 * each)
    choice = choose_context(config, None, "f16", weights, cache_in_file=False)
    assert choice.n_ctx % BLOCK_CELLS == 0
    assert 4000 - BLOCK_CELLS < choice.n_ctx <= 4000
    assert choice.note is not None
    assert f"context: {choice.n_ctx} positions of the 10240 trained" in choice.note
    in_file = choose_context(config, None, "f16", weights, cache_in_file=True)
    assert in_file.n_ctx == 10240


def test_weights_beyond_memory(available: Any) -> None:
    available(8 << 30)
    assert oversize_note(8 << 30, 1 << 30) is None
    note = oversize_note(16 << 30, 2 << 30)
    assert note is not None
    assert "weights of 16.0 GiB exceed the 8.0 GiB" in note
    assert "about 1.9 tokens/s" in note  # half of 2 GiB from a drive of 2 GB/s


def test_active_weights(path: Path, config: ModelConfig) -> None:
    file = read_gguf(path)
    sizes = {name: info.n_bytes for name, info in file.tensors.items()}
    experts = sum(size for name, size in sizes.items() if "_exps." in name)
    others = sum(sizes.values()) - experts - sizes["token_embd.weight"]
    assert active_weight_bytes(config, sizes) == others + experts // 2  # 3 of 6 experts


# ---- loading -------------------------------------------------------------------------------------


def test_refused_before_loading(path: Path, available: Any) -> None:
    available(1 * MIB)
    phases: list[str] = []
    with pytest.raises(MemoryLimitError, match="GiB of memory needed"):
        Model.load(path, n_ctx=10240, on_progress=lambda phase, *_: phases.append(phase))
    available(2 * MIB)
    with pytest.raises(MemoryLimitError, match="copied weights"):
        Model.load(path, n_ctx=64, mmap=False, on_progress=lambda phase, *_: phases.append(phase))
    assert phases == []


def test_workspace_counts(path: Path, available: Any) -> None:
    """It is known only when the graphs are planned; the cache alone would fit."""
    with Model.load(path, n_ctx=512, threads=1) as model:
        memory = model.memory
    assert memory.workspace_bytes > 0
    available(memory.cache_bytes + memory.workspace_bytes // 2)
    with pytest.raises(MemoryLimitError, match="workspace"):
        Model.load(path, n_ctx=512, threads=1)
    available(memory.cache_bytes + memory.workspace_bytes)
    Model.load(path, n_ctx=512, threads=1).close()


def test_copied_weights_count_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read weights are in memory when the workspace is checked: what is left is after them."""
    with Model.load(path, n_ctx=512, threads=1) as model:
        memory = model.memory
    size = path.stat().st_size
    left = [size + memory.cache_bytes + memory.workspace_bytes]
    monkeypatch.setattr(_core, "available_memory_bytes", lambda root="": left[0])
    read = _core.LoadedFile

    def reading(*args: Any) -> Any:
        left[0] -= size
        return read(*args)

    monkeypatch.setattr(_core, "LoadedFile", reading)
    with Model.load(path, n_ctx=512, threads=1, mmap=False) as model:
        assert model.memory.weights_copied_bytes == size


def test_cache_in_a_file_is_no_memory(path: Path, available: Any, tmp_path: Path) -> None:
    with Model.load(path, n_ctx=512, n_batch=16, threads=1) as model:
        workspace = model.memory.workspace_bytes
    available(workspace + MIB)
    with Model.load(path, n_batch=16, threads=1, kv_file=tmp_path / "cache") as model:
        assert model.n_ctx == 10240
        assert model.memory.cache_bytes > workspace + MIB


def test_sessions_are_refused_too(path: Path, available: Any) -> None:
    with Model.load(path, n_ctx=512, threads=1) as model:
        available(model.memory.workspace_bytes + model.memory.cache_bytes)
        model.session()
        with pytest.raises(MemoryLimitError, match="cache"):
            model.session(n_ctx=5120)


def test_report_and_notes(path: Path) -> None:
    with Model.load(path, threads=1) as model:
        memory = model.memory
        assert model.notes == ["context: 10240 positions, the trained length"]
    assert memory.weights_mapped_bytes == path.stat().st_size
    assert memory.weights_copied_bytes == 0
    assert memory.cache_bytes_per_position == 2 * (256 + 64) * 2
    assert memory.cache_bytes == 10240 * memory.cache_bytes_per_position
    assert memory.anonymous_bytes == memory.cache_bytes + memory.workspace_bytes
    with Model.load(path, n_ctx=100, threads=1) as model:
        assert model.notes == []
        assert model.memory.cache_bytes == 128 * memory.cache_bytes_per_position


def test_network_files_are_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_core, "is_network_fs", lambda path: True)
    with Model.load(path, n_ctx=64, threads=1) as model:
        assert model.memory.weights_mapped_bytes == 0
        assert model.memory.weights_copied_bytes == path.stat().st_size
        assert len(model.generate([1, 2, 3], max_tokens=2, ignore_eos=True).tokens) == 2


def test_network_files_must_fit(
    path: Path, monkeypatch: pytest.MonkeyPatch, available: Any
) -> None:
    monkeypatch.setattr(_core, "is_network_fs", lambda path: True)
    available(2 * MIB)
    with pytest.raises(MemoryLimitError, match="copied weights"):
        Model.load(path, n_ctx=64, threads=1)


@pytest.mark.parametrize("mmap", [True, False])
def test_load_progress(path: Path, mmap: bool) -> None:
    seen: list[tuple[str, int, int]] = []
    Model.load(path, n_ctx=64, mmap=mmap, on_progress=lambda *args: seen.append(args)).close()
    size = path.stat().st_size
    assert {phase for phase, _, _ in seen} == {"load"}
    assert (seen[0], seen[-1]) == (("load", 0, size), ("load", size, size))
    assert seen == sorted(seen)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_ctx": 0}, "n_ctx 0; accepted is 1 or more"),
        ({"threads": 0}, "threads 0"),
        ({"n_batch": -1}, "n_batch -1"),
        ({"attention": "both"}, "attention 'both'; accepted are auto, absorbed, expanded"),
        ({"precision": "half"}, "precision 'half'; accepted are fast, exact"),
        ({"cache_type": "q4_0"}, "cache_type 'q4_0'; accepted are f32, f16, bf16, q8_0"),
        ({"device": "tpu"}, "device 'tpu'; accepted are auto, cpu"),
    ],
)
def test_wrong_options(path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Model.load(path, **options)
