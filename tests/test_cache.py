"""The latent cache: what it costs, and its sequences against a plain model of them."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from mla_backend import _core
from mla_backend.cache import (
    BLOCK_CELLS,
    CACHE_TYPES,
    CacheSequence,
    LatentCache,
    bytes_per_position,
    cache_bytes,
    row_bytes,
)
from mla_backend.config import ModelConfig, config_from_gguf
from mla_backend.errors import ContextError, DeviceError, MemoryLimitError, ShapeError, UsageError
from mla_backend.gguf import read_gguf
from mla_backend.models.rope import rope_frequencies
from small_models import small_model

BACKEND = _core.CpuBackend(_core.ThreadPool(1))


def config(**changes: Any) -> ModelConfig:
    """Of a tiny model, with widths like those of the real ones where they are not changed."""
    file = read_gguf(small_model("tiny-v2", "f32", n_layer=2))
    return replace(config_from_gguf(file), **({"kv_lora_rank": 512} | changes))


def cache(n_ctx: int, type: str = "f32", **options: Any) -> LatentCache:
    return LatentCache(config(), n_ctx, type, backend=BACKEND, **options)


# ---- sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n_layer", "type", "n_bytes"),
    [
        (27, "f32", 27 * 576 * 4),
        (27, "f16", 31_104),  # V2-Lite
        (27, "bf16", 31_104),
        (27, "q8_0", 18_144),  # 512 / 32 blocks of 34 bytes, and 64 numbers of 2
        (61, "f16", 70_272),  # V3
    ],
)
def test_bytes_per_position(n_layer: int, type: str, n_bytes: int) -> None:
    shape = config(n_layer=n_layer)
    assert shape.d_rope == 64
    assert bytes_per_position(shape, type) == n_bytes
    assert cache_bytes(shape, type, 128) == 128 * n_bytes
    assert cache_bytes(shape, type, 129) == 192 * n_bytes


@pytest.mark.parametrize("type", CACHE_TYPES)
def test_memory_is_allocated_once_and_holds_nothing_else(type: str) -> None:
    made = cache(100, type)
    assert made.n_cells == 128
    assert made.total_bytes == 128 * made.bytes_per_position == made.memory.n_host_bytes
    latent, rope = row_bytes(config(), type)
    assert made.bytes_per_position == 2 * (latent + rope)
    planes = made.layout.layers[1]
    assert (planes.latent.shape, planes.rope.shape) == ([128, 512], [128, 64])
    assert planes.latent.format == type.upper()
    assert planes.rope.format == {"q8_0": "F16"}.get(type, type.upper())


def test_wrong_requests() -> None:
    with pytest.raises(UsageError, match="'q4_0'; accepted are f32, f16, bf16, q8_0"):
        bytes_per_position(config(), "q4_0")
    with pytest.raises(UsageError, match="multiple of 32; this model's is 80"):
        bytes_per_position(config(kv_lora_rank=80), "q8_0")
    with pytest.raises(UsageError, match="n_ctx 0"):
        cache(0)
    with pytest.raises(MemoryLimitError, match="cannot allocate"):
        cache(1 << 50)


def test_file_has_its_space_and_no_name(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    made = cache(100, kv_file=path)
    assert not path.exists()
    made.write(made.add(), np.ones((2, 3, made._cell_bytes), np.uint8))
    with pytest.raises(DeviceError, match="cannot be created: No such file"):
        cache(100, kv_file=tmp_path / "missing" / "cache")
    path.touch()
    with pytest.raises(UsageError, match="exists already"):
        cache(100, kv_file=path)


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="there is no small file system")
def test_full_disk_is_an_error(tmp_path: Path) -> None:
    free = os.statvfs("/dev/shm")
    n_ctx = 2 * free.f_bavail * free.f_frsize // cache(64).bytes_per_position + 64
    with pytest.raises(MemoryLimitError, match="no room for a cache"):
        cache(n_ctx, kv_file=Path("/dev/shm") / f"cache-{os.getpid()}")


# ---- sequences -----------------------------------------------------------------------------------


def test_sequences_are_limited() -> None:
    made = cache(64, max_sequences=2)
    first = made.add()
    made.fork(first)
    with pytest.raises(ContextError, match="holds its 2 sequences"):
        made.fork(first)
    made.remove(first)
    made.add()


def test_ranges_are_checked() -> None:
    made = cache(64)
    sequence = made.add()
    made.write(sequence, np.zeros((2, 5, made._cell_bytes), np.uint8))
    for call in (
        lambda: made.truncate(sequence, 6),
        lambda: made.truncate(sequence, -1),
        lambda: made.keep_last(sequence, 6),
        lambda: made.drop(sequence, 3, 2),
        lambda: made.drop(sequence, 3, 6),
        lambda: made.shift(sequence, -1),
    ):
        with pytest.raises(ShapeError):
            call()
    assert sequence.n_cells == 5


def test_fork_shares_until_one_goes_on() -> None:
    made = cache(4 * BLOCK_CELLS)
    parent = made.add()
    made.write(parent, np.ones((2, BLOCK_CELLS + 5, made._cell_bytes), np.uint8))
    child = made.fork(parent)
    assert child.blocks == parent.blocks
    assert made.n_free_cells == 2 * BLOCK_CELLS
    made.reserve(child, 1)
    assert child.blocks[0] == parent.blocks[0]
    assert child.blocks[1] != parent.blocks[1]
    assert made.n_free_cells == BLOCK_CELLS
    made.remove(parent)
    assert made.n_free_cells == 2 * BLOCK_CELLS


@dataclass
class Plain:
    """A sequence as nobody would store it: every cell on its own.

    ``tags`` [n] tells cells apart (in every number of the latent), ``keys`` [n, R / 2] is the roped
    key as complex numbers.
    """

    tags: list[float] = field(default_factory=list)
    keys: list[npt.NDArray[np.complex128]] = field(default_factory=list)
    first_position: int = 0

    def copy(self) -> Plain:
        return Plain(list(self.tags), list(self.keys), self.first_position)

    def cut(self, begin: int, end: int) -> None:
        del self.tags[begin:end]
        del self.keys[begin:end]


class CacheMachine(RuleBasedStateMachine):
    """Random calls on a cache of eight blocks and four sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.config = config(n_layer=1, kv_lora_rank=32)
        self.cache = LatentCache(
            self.config, 8 * BLOCK_CELLS, "f32", backend=BACKEND, max_sequences=4
        )
        self.frequencies = rope_frequencies(self.config).astype(np.float64)
        self.pairs: list[tuple[CacheSequence, Plain]] = []
        self.n_tags = 0

    def pick(self, index: int) -> tuple[CacheSequence, Plain]:
        return self.pairs[index % len(self.pairs)]

    @rule()
    def add(self) -> None:
        if len(self.pairs) == 4:
            with pytest.raises(ContextError):
                self.cache.add()
        else:
            self.pairs.append((self.cache.add(), Plain()))

    @precondition(lambda self: 0 < len(self.pairs) < 4)
    @rule(index=st.integers(0, 3))
    def fork(self, index: int) -> None:
        sequence, plain = self.pick(index)
        self.pairs.append((self.cache.fork(sequence), plain.copy()))

    @precondition(lambda self: self.pairs)
    @rule(index=st.integers(0, 3))
    def remove(self, index: int) -> None:
        sequence, _ = self.pairs.pop(index % len(self.pairs))
        self.cache.remove(sequence)

    @precondition(lambda self: self.pairs)
    @rule(index=st.integers(0, 3), n=st.integers(1, 150))
    def write(self, index: int, n: int) -> None:
        sequence, plain = self.pick(index)
        rows = np.zeros((1, n, 32 + self.config.d_rope), np.float32)
        rows[..., :32] = np.arange(self.n_tags, self.n_tags + n)[:, None]
        rows[..., 32::2] = 1.0
        before = list(sequence.blocks)
        try:
            self.cache.write(sequence, rows.view(np.uint8))
        except ContextError:
            assert self.cache.n_free_cells < n + BLOCK_CELLS + 1
            assert sequence.blocks == before
            return
        plain.tags += rows[0, :, 0].tolist()
        plain.keys += [np.ones(self.config.d_rope // 2, np.complex128)] * n
        self.n_tags += n

    @precondition(lambda self: self.pairs)
    @rule(index=st.integers(0, 3), n=st.integers(1, 90), give_back=st.booleans())
    def reserve_in_vain(self, index: int, n: int, give_back: bool) -> None:
        sequence, _ = self.pick(index)
        try:
            cells = self.cache.reserve(sequence, n)
        except ContextError:
            return
        assert len(set(cells.tolist())) == n
        if give_back:
            self.cache.release(sequence)

    @precondition(lambda self: self.pairs)
    @rule(index=st.integers(0, 3), share=st.floats(0, 1))
    def truncate(self, index: int, share: float) -> None:
        sequence, plain = self.pick(index)
        n = int(share * len(plain.tags))
        self.cache.truncate(sequence, n)
        plain.cut(n, len(plain.tags))

    @precondition(lambda self: self.pairs)
    @rule(index=st.integers(0, 3), share=st.floats(0, 1))
    def keep_last(self, index: int, share: float) -> None:
        sequence, plain = self.pick(index)
        n_dropped = int(share * len(plain.tags))
        self.cache.keep_last(sequence, len(plain.tags) - n_dropped)
        plain.cut(0, n_dropped)
        plain.first_position += n_dropped

    @precondition(lambda self: self.pairs)
    @rule(index=st.integers(0, 3), delta=st.integers(-100, 100))
    def shift(self, index: int, delta: int) -> None:
        sequence, plain = self.pick(index)
        if plain.first_position + delta < 0:
            with pytest.raises(ShapeError):
                self.cache.shift(sequence, delta)
            return
        try:
            self.cache.shift(sequence, delta)
        except ContextError:
            return
        turn = np.exp(1j * delta * self.frequencies)
        plain.keys = [key * turn for key in plain.keys]
        plain.first_position += delta

    @precondition(lambda self: self.pairs)
    @rule(index=st.integers(0, 3), ends=st.tuples(st.floats(0, 1), st.floats(0, 1)))
    def drop(self, index: int, ends: tuple[float, float]) -> None:
        sequence, plain = self.pick(index)
        begin, end = sorted(int(share * len(plain.tags)) for share in ends)
        try:
            self.cache.drop(sequence, begin, end)
        except ContextError:
            return
        turn = np.exp(1j * (begin - end) * self.frequencies)
        plain.keys[end:] = [key * turn for key in plain.keys[end:]]
        plain.cut(begin, end)

    @invariant()
    def contents_agree(self) -> None:
        for sequence, plain in self.pairs:
            assert sequence.n_cells == len(plain.tags)
            assert sequence.first_position == plain.first_position
            assert sequence.next_position == plain.first_position + len(plain.tags)
            rows = self.cache.read(sequence).view(np.float32)[0]
            assert (rows[:, :32] == np.reshape(plain.tags, (-1, 1))).all()
            keys = np.reshape(plain.keys, (-1, self.config.d_rope // 2))
            np.testing.assert_allclose(rows[:, 32::2], keys.real, atol=1e-4)
            np.testing.assert_allclose(rows[:, 33::2], keys.imag, atol=1e-4)
            listed = self.cache.block_table[sequence.row, : len(sequence.blocks)]
            assert listed.tolist() == sequence.blocks

    @invariant()
    def no_block_is_lost(self) -> None:
        users = Counter(block for sequence, _ in self.pairs for block in sequence.blocks)
        assert users == {i: n for i, n in enumerate(self.cache._users) if n}
        free = self.cache._free
        assert sorted([*users, *free]) == list(range(8))
        rows = [sequence.row for sequence, _ in self.pairs]
        assert sorted([*rows, *self.cache._free_rows]) == list(range(4))


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(
    max_examples=60,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
