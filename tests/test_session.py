"""Sessions: independent pasts that can be fed, forked, cut, saved and loaded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mla_backend import CancelToken, Model, Session
from mla_backend.cache import BLOCK_CELLS
from mla_backend.errors import CancelledError, ContextError, SessionError, ShapeError, UsageError
from small_models import small_model

N_CTX = 256
ROUNDING = 1e-4


def load(**options: Any) -> Model:
    path = small_model("tiny-v2", "q8_0", n_layer=2)
    chosen = {"n_ctx": N_CTX, "n_batch": 32, "threads": 2, "precision": "exact"} | options
    return Model.load(path, **({"cache_type": "f32"} | chosen))


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with load() as made:
        yield made


def random_ids(n: int, seed: int = 1) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).integers(0, 1016, n)]


def go_on(model: Model, session: Session, n: int, **options: Any) -> tuple[int, ...]:
    """The next tokens of a session, sampled at a high temperature."""
    found = model.generate(
        session.tokens,
        session=session,
        max_tokens=n,
        ignore_eos=True,
        temperature=2.0,
        top_k=0,
        **options,
    )
    return found.tokens


# ---- feeding -------------------------------------------------------------------------------------


def test_feed_gives_the_last_rows(model: Model) -> None:
    ids = random_ids(100)
    want = model.logits(ids)
    for outputs in (1, 5, 40, 100):
        session = model.session()
        got = session.feed(ids, outputs=outputs)
        assert got.shape == (outputs, model.config.n_vocab)
        assert got.dtype == np.float32
        assert np.abs(got - want[-outputs:]).max() < ROUNDING
        assert (session.tokens, session.position) == (ids, 100)
    assert model.session().feed(ids, outputs=0).shape == (0, model.config.n_vocab)


def test_returned_logits_stay(model: Model) -> None:
    session = model.session()
    first = session.feed(random_ids(3))
    kept = first.copy()
    session.feed(random_ids(3, 2))
    np.testing.assert_array_equal(first, kept)


def test_sessions_are_independent(model: Model) -> None:
    one, other = model.session(), model.session(n_ctx=64)
    ids = random_ids(40)
    one.feed(ids[:20])
    other.feed(random_ids(30, 2))
    model.generate(random_ids(10, 3), max_tokens=3)
    got = one.feed(ids[20:])
    want = model.session()
    want.feed(ids[:20])
    np.testing.assert_array_equal(got, want.feed(ids[20:]))
    assert (one.n_ctx, other.n_ctx) == (N_CTX, 64)


def test_wrong_tokens_change_nothing(model: Model) -> None:
    session = model.session(n_ctx=64)
    session.feed(random_ids(60))
    for call, error in [
        (lambda: session.feed([]), ShapeError),
        (lambda: session.feed([1], outputs=2), ShapeError),
        (lambda: session.feed([1024]), ShapeError),
        (lambda: session.feed([-1]), ShapeError),
        (lambda: session.feed(random_ids(5)), ContextError),
    ]:
        with pytest.raises(error):
            call()
        assert session.position == 60
    session.feed(random_ids(4))
    assert session.n_free == 0


def test_cancelled_feed_keeps_whole_chunks(model: Model) -> None:
    session, cancel = model.session(), CancelToken()

    def progress(phase: str, done: int, total: int) -> None:
        if done == 64:
            cancel.cancel()

    ids = random_ids(150)
    with pytest.raises(CancelledError):
        session.feed(ids, cancel=cancel, on_progress=progress)
    assert session.tokens == ids[:64]
    got = session.feed(ids[64:])
    assert np.abs(got - model.logits(ids)[-1:]).max() < ROUNDING


# ---- going back ----------------------------------------------------------------------------------


def test_an_interrupt_amid_a_step_leaves_the_session_as_it_was(model: Model) -> None:
    def interrupted(_: object) -> bool:
        raise KeyboardInterrupt

    ids = random_ids(40)
    with model.session() as session, model.session() as other:
        want = other.feed([*ids, 5])
        session.feed(ids)
        with pytest.raises(KeyboardInterrupt):
            session.step(7, interrupted)
        assert session.tokens == ids
        assert session.position == len(ids)
        np.testing.assert_allclose(session.feed([5]), want, atol=ROUNDING)


def test_fork(model: Model) -> None:
    ids, more = random_ids(70), random_ids(8, 2)
    session = model.session()
    session.feed(ids)
    n_free = session._cache.n_free_cells
    twin = session.fork()
    assert session._cache.n_free_cells == n_free
    got = twin.feed(more)
    session.feed(random_ids(9, 3))
    assert twin.tokens == ids + more
    again = model.session()
    again.feed(ids)
    np.testing.assert_array_equal(got, again.feed(more))
    twin.close()
    session.close()
    assert session._cache.n_free_cells == N_CTX


def test_truncate_and_drop(model: Model) -> None:
    ids, more = random_ids(70), random_ids(8, 2)
    session = model.session()
    session.feed(ids)
    session.truncate(33)
    assert (session.tokens, session.position) == (ids[:33], 33)
    assert np.abs(session.feed(more) - model.logits(ids[:33] + more)[-1]).max() < ROUNDING
    session.drop(3, 10)
    assert session.tokens == ids[:3] + ids[10:33] + more
    assert session.position == 34


def test_keep_last_and_shift(model: Model) -> None:
    ids, more = random_ids(90), random_ids(4, 2)
    session = model.session()
    session.feed(ids)
    twin = session.fork()
    session.keep_last(30)
    assert (session.tokens, session.position) == (ids[60:], 90)
    session.shift(-60)
    assert session.position == 30
    with pytest.raises(ShapeError, match="shift by -1"):
        session.shift(-1)
    # The latents still know the text that was dropped; only its own cells are gone.
    assert session.feed(more).shape == (1, model.config.n_vocab)
    want = model.session()
    want.feed(ids)
    np.testing.assert_array_equal(twin.feed(more), want.feed(more))


def test_closed_session(model: Model) -> None:
    with model.session() as session:
        session.feed(random_ids(5))
    session.close()
    assert session.tokens == []
    for call in (
        lambda: session.feed([1]),
        lambda: session.truncate(0),
        session.fork,
        lambda: session.position,
    ):
        with pytest.raises(UsageError, match="session is closed"):
            call()


def test_model_generates_in_a_session(model: Model) -> None:
    """Beside an open stream of the model's own context."""
    prompt = random_ids(20)
    want = model.generate(prompt, max_tokens=6, temperature=0.0, ignore_eos=True).tokens
    stream = model.stream(random_ids(5, 9), max_tokens=5, ignore_eos=True)
    next(stream)
    session = model.session()
    got = model.generate(prompt, session=session, max_tokens=6, temperature=0.0, ignore_eos=True)
    assert got.tokens == want
    assert session.tokens == [*prompt, *want[:-1]]
    stream.close()


# ---- saving --------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache_type", ["f32", "f16", "bf16", "q8_0"])
def test_saved_session_goes_on_identically(tmp_path: Path, cache_type: str) -> None:
    path = tmp_path / "session"
    with load(cache_type=cache_type, precision="fast") as model:
        session = model.session()
        session.feed(random_ids(70))
        go_on(model, session, 5, seed=11)
        session.save(path)
        want = go_on(model, session, 8)
        kept = list(session.tokens)
    with load(cache_type=cache_type, precision="fast") as model:
        session = model.session()
        session.feed(random_ids(20, 5))
        session.load(path)
        assert session.position == 74
        assert go_on(model, session, 8) == want
        assert session.tokens == kept


def test_fork_saves_and_loads_its_cells(tmp_path: Path, model: Model) -> None:
    session = model.session()
    session.feed(random_ids(100))
    twin = session.fork()
    twin.truncate(90)
    twin.save(tmp_path / "twin")
    twin.load(tmp_path / "twin")
    np.testing.assert_array_equal(
        session._cache.read(twin._sequence), session._cache.read(session._sequence)[:, :90]
    )
    assert session.position == 100


def test_model_saves_its_own_context(tmp_path: Path, model: Model) -> None:
    prompt = random_ids(50)
    model.generate(prompt, max_tokens=1)
    model.save_session(tmp_path / "context")
    model.logits([1])
    model.load_session(tmp_path / "context")
    assert model.generate([*prompt, 5], max_tokens=1).stats.n_reused == 50


def saved(model: Model, path: Path, n: int = 70) -> Path:
    session = model.session()
    session.feed(random_ids(n))
    session.save(path)
    return path


def refuse(session: Session, path: Path, error: type[Exception], message: str) -> None:
    """Loading fails, and the session is as it was."""
    before = (list(session.tokens), session._cache.read(session._sequence).tobytes())
    with pytest.raises(error, match=message):
        session.load(path)
    after = (list(session.tokens), session._cache.read(session._sequence).tobytes())
    assert after == before


def test_sessions_of_others_are_refused(tmp_path: Path, model: Model) -> None:
    path = saved(model, tmp_path / "session")
    other_weights = small_model("tiny-v2", "q8_0", n_layer=2, seed=1)
    with Model.load(other_weights, n_ctx=N_CTX, threads=1, cache_type="f32") as other:
        refuse(other.session(), path, SessionError, "saved with model")
    with load(cache_type="f16") as other:
        refuse(other.session(), path, SessionError, "saved with cache type f32; this one is f16")
    small = model.session(n_ctx=64)
    small.feed(random_ids(5))
    refuse(small, path, ContextError, "70 positions do not fit: the context holds 64")


def test_session_that_forks_leave_no_room_for(tmp_path: Path, model: Model) -> None:
    path = saved(model, tmp_path / "session", n=3 * BLOCK_CELLS)
    session = model.session()
    session.feed(random_ids(2 * BLOCK_CELLS))
    twin = session.fork()
    refuse(twin, path, ContextError, "do not fit")
    session.truncate(BLOCK_CELLS)
    twin.load(path)
    assert twin.tokens == random_ids(3 * BLOCK_CELLS)
    assert session.tokens == random_ids(2 * BLOCK_CELLS)[:BLOCK_CELLS]
