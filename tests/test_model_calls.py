"""Calls of the public face that go wrong, and what they leave behind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from mla_backend import Model
from mla_backend.cli import main
from mla_backend.errors import ContextError, ShapeError, UsageError
from small_models import small_model

N_CTX = 128
PROMPT = list(range(40, 60))


@pytest.fixture(scope="module")
def path() -> Path:
    return small_model("tiny-v2", "q8_0", n_layer=2)


@pytest.fixture
def model(path: Path) -> Iterator[Model]:
    with Model.load(path, n_ctx=N_CTX, threads=1, precision="exact", cache_type="f32") as made:
        yield made


def test_streams_refuse_prompts_at_once(model: Model) -> None:
    with pytest.raises(UsageError, match="prompt is empty"):
        model.stream("")
    with pytest.raises(ContextError, match="exceeds the context"):
        model.stream([5] * (N_CTX + 1))
    with pytest.raises(UsageError, match="conversation is empty"):
        model.stream_chat([])
    with pytest.raises(TypeError):
        model.stream([1.5])  # type: ignore[list-item]


def test_closed_sessions_stay_closed(model: Model) -> None:
    """Closing twice must not give the place in the cache away twice."""
    session = model.session()
    twin = session.fork()
    twin.close()
    twin.close()
    first, second = session.fork(), session.fork()
    rows = [first.feed(PROMPT), second.feed(PROMPT[::-1])]
    assert np.abs(first.feed([7]) - model.logits([*PROMPT, 7])[-1]).max() < 1e-4
    assert not np.array_equal(*rows)
    for call in (twin.fork, lambda: twin.feed(PROMPT), lambda: twin.truncate(0)):
        with pytest.raises(UsageError, match="session is closed"):
            call()


def test_session_keeps_the_last_and_renumbers(model: Model) -> None:
    with model.session() as session:
        session.feed(PROMPT)
        session.keep_last(5)
        assert (session.tokens, session.position) == (PROMPT[-5:], 20)
        session.shift(-15)
        assert session.position == 5
        with pytest.raises(ShapeError):
            session.shift(-1)


def test_random_numbers_go_on_only_with_the_text(model: Model) -> None:
    options = {"temperature": 5.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "ignore_eos": True}
    whole = model.generate(PROMPT, seed=3, max_tokens=12, **options).tokens
    part = model.generate(PROMPT, seed=3, max_tokens=6, **options).tokens
    rest = model.generate([*PROMPT, *part], max_tokens=6, **options).tokens
    assert part + rest == whole
    drawn = {model.generate(PROMPT, max_tokens=6, **options).tokens for _ in range(2)}
    assert len(drawn) == 2


def test_ids_work_without_a_known_tokenizer(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mla_backend.model.Tokenizer.can_decode", False)
    with Model.load(path, n_ctx=N_CTX, threads=1) as model:
        assert any("token ids still work" in note for note in model.notes)
        got = model.generate(PROMPT, max_tokens=4, ignore_eos=True)
        assert (got.text, len(got.tokens)) == ("", 4)
        with pytest.raises(UsageError, match="stop strings need text"):
            model.generate(PROMPT, stop="x")


def test_context_beyond_training_is_said(path: Path) -> None:
    with Model.load(path, n_ctx=10304, threads=1) as model:
        assert "context: 10304 positions, more than the 10240 trained" in model.notes


def test_wrong_sampling_is_refused_before_loading(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "missing.gguf", "-p", "x", "--repeat-penalty", "0"]) == 2
    assert "repeat_penalty is 0" in capsys.readouterr().err
