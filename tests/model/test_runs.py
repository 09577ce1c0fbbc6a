"""One computation, however it is cut: chunks, batches, threads, cache types, backends."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from mla_backend import Model, _core, runner
from mla_backend.cache import CACHE_TYPES, CacheSequence, LatentCache
from mla_backend.errors import CancelledError, ContextError, ShapeError, UnsupportedError
from mla_backend.models.inputs import BatchShape, CachePlanes
from mla_backend.runner import Piece, Runner
from model.debug import run_whole
from small_models import small_model

Floats = npt.NDArray[np.float32]
N_TOKENS = 150
#: Rounding in another order: float32 sums of a few hundred terms, logits of deviation 2.5.
ROUNDING = 1e-4
ALL_OPS = {
    "get_rows",
    "rms_norm",
    "rope",
    "matmul",
    "matmul_indexed",
    "swiglu_matmul",
    "route",
}


def random_ids(n: int, seed: int = 1) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).integers(0, 1016, n)]


def load(shape: str = "tiny-v3", type: str = "q4_k_m", **options: Any) -> Model:
    chosen = {"n_ctx": 256, "threads": 2, "precision": "exact", "cache_type": "f32"} | options
    return Model.load(small_model(shape, type, n_layer=2), **chosen)


@pytest.fixture(params=["absorbed", "expanded"])
def model(request: pytest.FixtureRequest) -> Iterator[Model]:
    with load(attention=request.param) as made:
        yield made


def bare(model: Model, n_ctx: int = 256) -> tuple[Runner, LatentCache]:
    """A runner over a cache that no session uses."""
    cache = LatentCache(model.config, n_ctx, model._cache_type, backend=model._backend)
    return Runner(model._engine, cache), cache


# ---- cuts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_batch", [1, 7, 64, 149])
def test_chunks_give_what_one_chunk_gives(model: Model, n_batch: int) -> None:
    ids = random_ids(N_TOKENS)
    whole = model.logits(ids)
    with load(attention=model._engine.attention, n_batch=n_batch) as other:
        assert np.abs(other.logits(ids) - whole).max() < ROUNDING


def test_decoding_gives_what_prefill_gives(model: Model) -> None:
    ids = random_ids(90)
    whole = model.logits(ids)
    session = model.session()
    steps = [session.feed(ids[:70], outputs=70), *(session.feed([token]) for token in ids[70:])]
    assert np.abs(np.concatenate(steps) - whole).max() < ROUNDING


def test_attention_modes_agree() -> None:
    ids = random_ids(N_TOKENS)
    logits = []
    for attention in ("absorbed", "expanded", "auto"):
        with load(attention=attention) as model:
            logits.append(model.logits(ids))
    assert np.abs(logits[0] - logits[1]).max() < ROUNDING
    np.testing.assert_array_equal(logits[1], logits[2])  # a fresh prompt expands


def test_batch_mixes_sequences(model: Model) -> None:
    """Three sequences at different positions, prefill beside decoding, in one pass."""
    prompts = [random_ids(n, seed) for seed, n in enumerate((80, 33, 5))]
    alone = [model.logits(ids) for ids in prompts]
    run, cache = bare(model)
    sequences = [cache.add() for _ in prompts]
    run.run([Piece(sequences[0], prompts[0][:79], 0), Piece(sequences[1], prompts[1][:20], 0)])
    got = run.run(
        [
            Piece(sequences[1], prompts[1][20:], 2),
            Piece(sequences[0], prompts[0][79:], 1),
            Piece(sequences[2], prompts[2], 5),
        ]
    )
    want = np.concatenate([alone[1][-2:], alone[0][-1:], alone[2]])
    assert np.abs(got - want).max() < ROUNDING
    assert [sequence.n_cells for sequence in sequences] == [80, 33, 5]


# ---- determinism ---------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("attention", ["absorbed", "expanded"])
def test_threads_do_not_change_a_bit(attention: str, precision: str) -> None:
    ids = random_ids(N_TOKENS)
    results = []
    for threads in (1, 2, 3):
        with load(threads=threads, attention=attention, precision=precision) as model:
            assert model.n_threads == threads
            results.append(model.logits(ids))
            session = model.session()
            results[-1] = np.concatenate([results[-1], session.feed(ids[:9]), session.feed([3])])
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


def test_twice_gives_the_same_bits(model: Model) -> None:
    ids = random_ids(N_TOKENS)
    first = model.logits(ids)
    model.generate(random_ids(20, 5), max_tokens=3)
    np.testing.assert_array_equal(model.logits(ids), first)


# ---- graphs --------------------------------------------------------------------------------------


def test_decoding_builds_no_graph(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[BatchShape] = []
    build = runner.build_graph

    def spy(*args: Any) -> _core.Graph:
        built.append(args[3])
        return build(*args)

    monkeypatch.setattr(runner, "build_graph", spy)
    session = model.session()
    session.feed(random_ids(10))
    session.feed([1])
    built.clear()
    for token in random_ids(100):
        session.feed([token])
    assert built == []


def test_graphs_kept_are_few(model: Model) -> None:
    run, cache = bare(model)
    for n in range(1, 40):
        sequence = cache.add()
        run.run([Piece(sequence, random_ids(n))])
        cache.remove(sequence)
    assert len(run._executors) <= 16


def test_intermediates_share_memory(model: Model) -> None:
    run, _ = bare(model)
    report = run.report(BatchShape(64, 1, 1))
    arena, unshared = report["arena_bytes"], report["unshared_bytes"]
    assert isinstance(arena, int)
    assert isinstance(unshared, int)
    assert 0 < arena < unshared / 3
    assert {backend for _, backend in report["steps"]} == {"cpu"}  # type: ignore[attr-defined]
    assert report["n_copies"] == 0


# ---- the cache's types ---------------------------------------------------------------------------

#: Largest median of the largest logit differences; their deviation is 2.5.
CACHE_ERROR = {"f32": ROUNDING, "f16": 0.01, "bf16": 0.06, "q8_0": 0.1}


@pytest.mark.parametrize("attention", ["absorbed", "expanded"])
@pytest.mark.parametrize("cache_type", CACHE_TYPES)
def test_cache_types(cache_type: str, attention: str) -> None:
    ids = random_ids(N_TOKENS)
    with load(attention="expanded") as model:
        want = model.logits(ids)
    with load(attention=attention, cache_type=cache_type, n_batch=40) as model:
        difference = np.abs(model.logits(ids) - want).max(axis=1)
    assert np.median(difference) < CACHE_ERROR[cache_type]


def test_cache_in_a_file(tmp_path: Path) -> None:
    ids = random_ids(N_TOKENS)
    with load() as model:
        want = model.logits(ids)
    with load(kv_file=tmp_path / "cache") as model:
        np.testing.assert_array_equal(model.logits(ids), want)
    assert list(tmp_path.iterdir()) == []


# ---- failures leave everything as it was ---------------------------------------------------------


def state(cache: LatentCache, sequences: list[CacheSequence]) -> tuple[Any, ...]:
    return (cache.n_free_cells, [(s.n_cells, len(s.blocks)) for s in sequences])


def test_full_cache_is_an_error_before_computing(model: Model) -> None:
    run, cache = bare(model, n_ctx=128)
    first, second = cache.add(), cache.add()
    run.run([Piece(first, random_ids(60))])
    before = state(cache, [first, second])
    with pytest.raises(ContextError, match="do not fit"):
        run.run([Piece(first, random_ids(30)), Piece(second, random_ids(70))])
    assert state(cache, [first, second]) == before
    run.run([Piece(second, random_ids(64))])


def test_cancelled_run_changes_nothing(model: Model) -> None:
    run, cache = bare(model)
    sequence = cache.add()
    run.run([Piece(sequence, random_ids(60))])
    before = state(cache, [sequence])
    token = _core.CancelToken()
    token.cancel()
    with pytest.raises(CancelledError):
        run.run([Piece(sequence, random_ids(90))], token)
    assert state(cache, [sequence]) == before
    token.reset()
    run.run([Piece(sequence, random_ids(90))], token)
    assert sequence.n_cells == 150


def test_batches_that_make_no_sense(model: Model) -> None:
    run, cache = bare(model)
    sequence = cache.add()
    for pieces, message in [
        ([], "one piece or more"),
        ([Piece(sequence, [])], "one token or more"),
        ([Piece(sequence, [1], 2)], "at most one row"),
        ([Piece(sequence, [1]), Piece(sequence, [2])], "one piece of a sequence"),
    ]:
        with pytest.raises(ShapeError, match=message):
            run.run(pieces)


# ---- several backends ----------------------------------------------------------------------------


@pytest.mark.parametrize("ops", [ALL_OPS, {"matmul", "route"}, {"rms_norm"}, set()])
def test_backends_take_turns(model: Model, ops: set[str]) -> None:
    """A backend that has some of the operations, and memory of its own, hands over to the next."""
    ids = random_ids(40)
    n = len(ids)
    subset = _core.SubsetBackend(model._backend, ops)
    got = run_whole(model, ids, n_outputs=n, workspace=_core.Workspace([subset, model._backend]))
    np.testing.assert_array_equal(got[0], run_whole(model, ids, n_outputs=n)[0])
    assert (subset.n_steps > 0) == bool(ops)


def test_unsupported_operation_is_an_error_before_running(model: Model) -> None:
    """No backend writes cache rows whose numbers lie apart: planning says so."""
    run, cache = bare(model)
    planes = cache.layout.layers[0]
    n_cells, n = planes.latent.shape
    apart = _core.Tensor(np.zeros((n_cells, n, 2), np.float32), "F32", [n_cells, n], [8 * n, 8])
    layers = (CachePlanes(apart, planes.rope), *cache.layout.layers[1:])
    cache.layout = replace(cache.layout, layers=layers)
    built = (
        r"no backend supports cache_write\(.*F32 \[256, 256\].*F32 \[4, 64\].*\(cpu: no kernel\)"
    )
    with pytest.raises(UnsupportedError, match=built):
        run.prepare(4)
