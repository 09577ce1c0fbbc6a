"""What moving the past does to the logits that follow it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pytest
from mla_backend import Model
from mla_backend.cache import CacheSequence, LatentCache
from mla_backend.runner import Piece, Runner
from reference.model import ReferenceModel
from small_models import small_model

Floats = npt.NDArray[np.float32]
ROUNDING = 1e-4
N_CTX = 640


def random_ids(n: int, seed: int = 1) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).integers(0, 1016, n)]


class Bench:
    """A model with a cache of its own, in float32 and one attention mode."""

    def __init__(self, attention: str, n_layer: int) -> None:
        self.path = small_model("tiny-v2", "f32", n_layer=n_layer)
        self.model = Model.load(
            self.path,
            n_ctx=N_CTX,
            threads=2,
            precision="exact",
            cache_type="f32",
            attention=attention,  # type: ignore[arg-type]
        )
        self.cache = LatentCache(
            self.model.config, N_CTX, "f32", backend=self.model._backend, max_sequences=8
        )
        self.runner = Runner(self.model._engine, self.cache)

    def feed(self, sequence: CacheSequence, ids: Sequence[int]) -> Floats:
        return self.runner.run([Piece(sequence, ids, len(ids))])

    def fresh(self, ids: Sequence[int]) -> CacheSequence:
        sequence = self.cache.add()
        self.feed(sequence, ids)
        return sequence


@pytest.fixture(params=["absorbed", "expanded"])
def deep(request: pytest.FixtureRequest) -> Iterator[Bench]:
    bench = Bench(request.param, n_layer=2)
    yield bench
    bench.model.close()


@pytest.fixture(params=["absorbed", "expanded"])
def shallow(request: pytest.FixtureRequest) -> Iterator[Bench]:
    """One layer: latents depend on their own token alone, so forgetting text leaves no trace."""
    bench = Bench(request.param, n_layer=1)
    yield bench
    bench.model.close()


def test_shift_gives_the_cache_of_the_new_positions(deep: Bench) -> None:
    ids = random_ids(100)
    moved, there = deep.fresh(ids), deep.cache.add()
    deep.cache.shift(moved, 123)
    there.first_position = 123
    deep.feed(there, ids)
    a, b = (deep.cache.read(sequence).view(np.float32) for sequence in (moved, there))
    np.testing.assert_allclose(a, b, atol=ROUNDING)
    difference = deep.feed(moved, random_ids(5, 2)) - deep.feed(there, random_ids(5, 2))
    assert np.abs(difference).max() < ROUNDING


def test_positions_count_relatively(deep: Bench) -> None:
    """To where the reference has them, and to where nothing but their distances counts."""
    ids, more = random_ids(70), random_ids(3, 2)
    reference = ReferenceModel(deep.path)
    sequence = deep.fresh(ids)
    deep.cache.shift(sequence, 1000)
    deep.cache.shift(sequence, -400)
    got = deep.feed(sequence, more)
    assert sequence.next_position == 673
    assert np.abs(got - reference.logits(ids + more, range(600, 673))[-3:]).max() < ROUNDING
    assert np.abs(got - reference.logits(ids + more)[-3:]).max() < ROUNDING


def test_fork_then_diverge(deep: Bench) -> None:
    ids, one, other = random_ids(80), random_ids(6, 2), random_ids(70, 3)
    parent = deep.fresh(ids)
    child = deep.cache.fork(parent)
    got_one, got_other = deep.feed(parent, one), deep.feed(child, other)
    np.testing.assert_array_equal(got_one, deep.feed(deep.fresh(ids), one))
    deep.cache.remove(parent)
    np.testing.assert_array_equal(got_other, deep.feed(deep.fresh(ids), other))


def test_shift_of_a_fork_leaves_the_other(deep: Bench) -> None:
    ids, more = random_ids(80), random_ids(6, 2)
    parent = deep.fresh(ids)
    child = deep.cache.fork(parent)
    deep.cache.shift(child, 55)
    deep.cache.drop(child, 3, 20)
    np.testing.assert_array_equal(deep.feed(parent, more), deep.feed(deep.fresh(ids), more))


def test_truncate_goes_back(deep: Bench) -> None:
    ids, more = random_ids(130), random_ids(4, 2)
    sequence = deep.fresh(ids)
    deep.cache.truncate(sequence, 70)
    want = deep.feed(deep.fresh(ids[:70]), more)
    assert np.abs(deep.feed(sequence, more) - want).max() < ROUNDING


@pytest.mark.parametrize("n_kept", [1, 37, 64, 99])
def test_keep_last_forgets_the_rest(shallow: Bench, n_kept: int) -> None:
    ids, more = random_ids(100), random_ids(4, 2)
    sequence = shallow.fresh(ids)
    shallow.cache.keep_last(sequence, n_kept)
    assert sequence.next_position == 100
    got = shallow.feed(sequence, more[:2])
    shallow.cache.shift(sequence, n_kept - 100)
    got = np.concatenate([got, shallow.feed(sequence, more[2:])])
    want = shallow.feed(shallow.fresh(ids[-n_kept:]), more)
    assert np.abs(got - want).max() < ROUNDING


@pytest.mark.parametrize(("begin", "end"), [(0, 10), (20, 21), (5, 90), (64, 100), (0, 100)])
def test_drop_forgets_a_part(shallow: Bench, begin: int, end: int) -> None:
    ids, more = random_ids(100), random_ids(4, 2)
    sequence = shallow.fresh(ids)
    shallow.cache.drop(sequence, begin, end)
    want = shallow.feed(shallow.fresh(ids[:begin] + ids[end:]) if end - begin < 100 else
                        shallow.cache.add(), more)  # fmt: skip
    assert np.abs(shallow.feed(sequence, more) - want).max() < ROUNDING
