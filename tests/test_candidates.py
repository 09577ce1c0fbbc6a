"""Tokens chosen from the best logits: the same as from all of them, for every parameter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cuda.device import cuda_problem
from hypothesis import given, settings
from hypothesis import strategies as st
from mla_backend import Model
from mla_backend.candidates import N_CANDIDATES, Candidates
from mla_backend.errors import ModelError, ShapeError, UsageError
from mla_backend.runner import Piece
from mla_backend.sampling import Sampler, SamplingParams
from reference.top_k import exp_sums, top_k
from small_models import small_model

Floats = np.ndarray[Any, np.dtype[np.float32]]
OFF: dict[str, Any] = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 5}
#: Of a float32 sum, in log-probabilities.
LOGPROB_ERROR = 1e-5


def best_of(logits: Floats, k: int = N_CANDIDATES) -> Candidates:
    ids = top_k(logits[None], min(k, logits.size))[0]
    total = float(exp_sums(logits[None]).astype(np.float32)[0])
    return Candidates(ids, logits[ids], total, logits.size)


def row(seed: int, n: int = 1000, spread: float = 3.0) -> Floats:
    return (spread * np.random.default_rng(seed).normal(size=n)).astype(np.float32)


def decides(logits: Floats, **options: Any) -> bool:
    enough = Sampler(SamplingParams(**{**OFF, **options})).enough
    return enough is not None and enough(best_of(logits))


# ---- a row ---------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    n_vocab=st.sampled_from([1, 5, 63, 64, 65, 300, 3000]),
    spread=st.sampled_from([0.1, 1.0, 4.0, 30.0]),
    is_coarse=st.booleans(),
    params=st.builds(
        SamplingParams,
        temperature=st.sampled_from([0.0, 1e-3, 0.8, 1.0, 5.0]),
        top_k=st.sampled_from([0, 1, 40, 64, 65, 5000]),
        top_p=st.sampled_from([0.0, 0.3, 0.95, 0.999999, 1.0]),
        min_p=st.sampled_from([0.0, 0.05, 1.0]),
        logprobs=st.sampled_from([0, 1, 5, 64]),
    ),
)
def test_the_same_token_and_the_same_random_numbers(
    seed: int, n_vocab: int, spread: float, is_coarse: bool, params: SamplingParams
) -> None:
    logits = row(seed, n_vocab, spread)
    if is_coarse:
        logits = np.round(logits)  # many are equal
    params = replace(params, seed=seed)
    short, full = Sampler(params), Sampler(params)
    best = best_of(logits)
    if short.enough is None or not short.enough(best):
        return
    for _ in range(3):
        got, want = short.sample(best), full.sample(logits)
        assert got.token == want.token
        assert got.logprob == pytest.approx(want.logprob, abs=LOGPROB_ERROR)
        assert [i for i, _ in got.top_logprobs] == [i for i, _ in want.top_logprobs]
    assert short.state() == full.state()


def test_what_candidates_decide() -> None:
    peaked, flat = row(0, spread=5.0), row(0, spread=0.01)
    for logits in (peaked, flat):
        assert decides(logits, temperature=0.0)
        assert decides(logits, temperature=0.0, top_k=500)
        assert decides(logits, top_k=40, top_p=0.95, min_p=0.05)
        assert decides(logits, top_k=64)
        assert decides(logits, top_k=1)
    assert decides(peaked, top_p=0.9)
    assert not decides(flat, top_p=0.9)  # it takes more than 64
    assert decides(peaked, min_p=0.1)
    assert not decides(flat, min_p=0.1)
    assert not decides(peaked, top_p=1 - 1e-9)


def test_what_always_takes_all_logits() -> None:
    def never(**options: Any) -> bool:
        return Sampler(SamplingParams(**{**OFF, "top_k": 40, **options})).enough is None

    assert not never()
    assert never(top_k=0)  # every token may come
    assert never(top_k=65)
    assert never(repeat_penalty=1.1)
    assert never(frequency_penalty=0.1)
    assert never(logit_bias={3: 1.0})
    assert never(logprobs=65)
    assert not never(logprobs=64)
    assert Sampler(SamplingParams(), [lambda _, logits: logits]).enough is None


def test_a_close_call_is_left_to_all_logits() -> None:
    """Two tokens of half the mass each: rounding of the total would tell whether one is enough."""
    logits = np.full(1000, -np.inf, np.float32)
    logits[[7, 9]] = 2.0
    assert not decides(logits, top_p=0.5)
    assert decides(logits, top_p=0.4)
    assert decides(logits, top_p=0.6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_damaged_rows_are_looked_at_whole(bad: float) -> None:
    logits = np.full(1000, -np.inf, np.float32) if bad == -np.inf else row(3)
    logits[900] = bad
    for options in ({"temperature": 0.0}, {"top_k": 40}, {"top_p": 0.5}):
        assert not decides(logits, **options)
    with pytest.raises(ModelError):
        Sampler(SamplingParams()).sample(logits)


def test_candidates_that_do_not_decide_are_refused() -> None:
    for options in ({}, {"top_k": 65}, {"repeat_penalty": 2.0, "top_k": 4}):
        with pytest.raises(UsageError, match="the candidates do not decide"):
            Sampler(SamplingParams(**{**OFF, **options})).sample(best_of(row(1, spread=0.01)))


# ---- a model -------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["cpu", "cuda"])
def model(request: pytest.FixtureRequest) -> Iterator[Model]:
    device = str(request.param)
    if device == "cuda" and (problem := cuda_problem()):
        pytest.skip(problem)
    path = small_model("tiny-v3", "q8_0", n_layer=2)
    with Model.load(path, device=device, n_ctx=512, n_batch=16, threads=2) as made:
        yield made


def step_by_step(model: Model, prompt: Sequence[int], n: int, **options: Any) -> list[int]:
    """What a sampler makes of all logits."""
    sampler = Sampler(SamplingParams(**options))
    with model.session() as session:
        logits = session.feed(prompt)[-1]
        while True:
            token = sampler.sample(logits, session.tokens).token
            if len(session.tokens) == len(prompt) + n - 1:
                return [*session.tokens[len(prompt) :], token]
            logits = session.feed([token])[-1]


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        {"temperature": 0.8},
        {"temperature": 3.0, "top_k": 64, "top_p": 1.0, "min_p": 0.0},
        {"temperature": 1.5, "top_k": 0, "top_p": 0.6, "min_p": 0.0},
        {"temperature": 1.5, "top_k": 0, "top_p": 0.95, "min_p": 0.0},
        {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
        {"temperature": 1.0, "repeat_penalty": 1.3},
    ],
    ids=str,
)
def test_generation_is_that_of_all_logits(model: Model, options: dict[str, Any]) -> None:
    prompt = [5, 3, 8, 13, 2]
    for seed in (1, 2):
        given = {**options, "seed": seed}
        model.generate([1], max_tokens=0)  # the prompt is read anew
        got = model.generate(prompt, max_tokens=12, ignore_eos=True, **given)
        assert list(got.tokens) == step_by_step(model, prompt, 12, **given)


def test_rows_that_are_not_decided_come_whole(model: Model) -> None:
    runner, cache = model._runner, model._cache
    prompts = [[1, 2, 3], [4, 5]]
    sequences = [cache.add() for _ in prompts]
    twins = [cache.add() for _ in prompts]
    pieces = [Piece(s, ids) for s, ids in zip(sequences, prompts, strict=True)]
    seen: list[Candidates] = []

    def note(best: Candidates) -> bool:
        seen.append(best)
        return len(seen) == 2

    rows = runner.run_for(pieces, [note, note])
    want = runner.run([Piece(s, ids) for s, ids in zip(twins, prompts, strict=True)])
    assert isinstance(rows[1], Candidates)
    np.testing.assert_array_equal(rows[0], want[0])
    for best, logits in zip(seen, want, strict=True):
        np.testing.assert_array_equal(best.ids, top_k(logits[None], N_CANDIDATES)[0])
        np.testing.assert_array_equal(best.values, logits[best.ids])
        assert best.total == pytest.approx(exp_sums(logits[None])[0], rel=1e-6)
    assert [s.n_cells for s in sequences] == [3, 2]
    with pytest.raises(ShapeError, match="candidates are of one output"):
        runner.run_for([Piece(sequences[0], [1], 0)], [note])
    for sequence in (*sequences, *twins):
        cache.remove(sequence)


def test_one_copy_there_and_one_back(model: Model) -> None:
    plans = [
        plan.report() for shape, plan in model._runner._executors.items() if shape.n_candidates
    ]
    assert plans
    on_device = model.placement.uses_devices
    assert {plan["n_copies"] for plan in plans} == {2 if on_device else 0}


def test_a_step_checks_like_a_feed(model: Model) -> None:
    with model.session() as session:
        session.feed([1, 2])
        with pytest.raises(ShapeError, match="token id"):
            session.step(model.config.n_vocab, lambda _: True)
        logits = session.step(3, None)
        assert isinstance(logits, np.ndarray)
        assert session.tokens == [1, 2, 3]
