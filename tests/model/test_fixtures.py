"""Every reference file against values that independent programs computed from it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from cuda.device import cuda_problem, is_emulated
from model.debug import hidden_states, routing
from model.reference_files import (
    FILES,
    MODES,
    PRECISIONS,
    PROMPTS,
    expected,
    gguf_path,
    loaded,
    log_probabilities,
    our_logits,
    peer_distances,
    perplexity_of_the_text,
    tolerances,
)

# Known to miss the limit of the last position, with avx2 and AVX-512 alike: one scale to 32
# activations, and a near tie sends that token to other experts.
LAST_ROUTED_APART = {
    ("tiny-v2", "IQ4_XS", "fast", "expanded", "long", "cpu"),
    ("tiny-v3", "Q4_K_M", "fast", "absorbed", "short", "cpu"),
    ("tiny-v3", "Q3_K_M", "fast", "expanded", "short", "cpu"),
}


@pytest.fixture(params=FILES, ids=lambda file: "-".join(file))
def file(request: pytest.FixtureRequest) -> tuple[str, str]:
    model, type = request.param
    return model, type


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> str:
    """The CPU, and a real CUDA device where there is one."""
    if request.param == "cuda" and (cuda_problem() or is_emulated()):
        pytest.skip(cuda_problem() or "an emulated device takes too long for whole models")
    return str(request.param)


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("attention", MODES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_logits(
    fixtures_dir: Path,
    file: tuple[str, str],
    precision: str,
    attention: str,
    prompt: str,
    device: str,
) -> None:
    limit = tolerances(*file, precision)
    want = expected(fixtures_dir, *file)
    got = our_logits(fixtures_dir, *file, attention, precision, prompt, device)
    ours = np.take_along_axis(log_probabilities(got), want[f"{prompt}_top_ids"], axis=1)
    d = np.abs(ours - want[f"{prompt}_top_logprobs"]).max(axis=1)
    assert np.median(d) <= limit.d_median
    assert np.quantile(d, 0.9) <= limit.d_p90
    last = np.abs(got[-1] - want[f"{prompt}_last_logits"]).max()
    if last > limit.last and (*file, precision, attention, prompt, device) in LAST_ROUTED_APART:
        pytest.xfail(f"last logits differ by {last:.2f}, the limit is {limit.last}")
    assert last <= limit.last
    assert (got.argmax(axis=1) == want[f"{prompt}_top_ids"][:, 0]).mean() >= limit.top1


@pytest.mark.parametrize("attention", MODES)
@pytest.mark.parametrize("model", ["tiny-v2", "tiny-v3"])
def test_logits_of_all_positions(fixtures_dir: Path, model: str, attention: str) -> None:
    want = expected(fixtures_dir, model, "BF16")["short_logits"]
    got = our_logits(fixtures_dir, model, "BF16", attention, "exact", "short")
    assert np.abs(got - want).max() <= 1e-4


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("attention", MODES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_greedy_continuation(
    fixtures_dir: Path,
    file: tuple[str, str],
    precision: str,
    attention: str,
    prompt: str,
    device: str,
) -> None:
    want = expected(fixtures_dir, *file)
    tokens = want[f"{prompt}_greedy_ids"]
    close = want[f"{prompt}_greedy_gap"] < tolerances(*file, precision).last
    # Where the two best tokens are that close, either may come, and then the texts differ.
    n_sure = int(close.argmax()) if precision == "fast" and close.any() else len(tokens)
    model = loaded(gguf_path(fixtures_dir, *file), attention, precision, device)
    got = model.generate(
        want[f"{prompt}_ids"].tolist(),
        temperature=0.0,
        max_tokens=max(n_sure, 1),
        ignore_eos=True,
    )
    assert got.tokens[:n_sure] == tuple(tokens[:n_sure])


@pytest.mark.parametrize("attention", MODES)
def test_distance_is_llama_cpps_at_most(
    fixtures_dir: Path, file: tuple[str, str], attention: str, device: str
) -> None:
    """Under ``fast``, 1.1 times its median and rms, our own exact logits being the truth.

    The median is that of the largest differences at a position. One token sent to other experts
    after a near tie rules the rms of the short prompt, so it is taken over both prompts together.
    """
    peer = peer_distances(fixtures_dir, *file)
    squares, peer_squares, n_tokens = 0.0, 0.0, 0
    for prompt in PROMPTS:
        truth = our_logits(fixtures_dir, *file, "expanded", "exact", prompt)
        ours = our_logits(fixtures_dir, *file, attention, "fast", prompt, device)
        difference = ours - truth
        median = np.median(np.abs(difference).max(axis=1))
        assert median <= 1.1 * peer[prompt]["worst_median"], prompt
        squares += float(np.square(difference, dtype=np.float64).mean(axis=1).sum())
        peer_squares += len(difference) * peer[prompt]["rms"] ** 2
        n_tokens += len(difference)
    assert np.sqrt(squares / n_tokens) <= 1.1 * np.sqrt(peer_squares / n_tokens)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_perplexity(fixtures_dir: Path, file: tuple[str, str], precision: str, device: str) -> None:
    """Chunks of 512 tokens, each begun by BOS; their second halves count."""
    want = perplexity_of_the_text(fixtures_dir, *file)
    model = loaded(gguf_path(fixtures_dir, *file), "auto", precision, device)
    ids = model.tokenizer.encode((fixtures_dir / "text.txt").read_text(encoding="utf-8"))
    assert model.tokenizer.bos_id is not None
    nll: list[float] = []
    for begin in range(0, len(ids) - len(ids) % 512, 512):
        chunk = [model.tokenizer.bos_id, *ids[begin + 1 : begin + 512]]
        logprobs = log_probabilities(model.logits(chunk))
        nll += (-logprobs[np.arange(256, 511), chunk[257:]]).tolist()
    assert np.exp(np.mean(nll)) == pytest.approx(want, rel=1e-4 if precision == "exact" else 0.02)


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("model", ["tiny-v2", "tiny-v3"])
def test_hidden_states(fixtures_dir: Path, model: str, prompt: str) -> None:
    """The last position at the embedding, after the first two layers, and after the final norm."""
    want = expected(fixtures_dir, model, "BF16")
    engine = loaded(gguf_path(fixtures_dir, model, "BF16"), "expanded", "exact")
    got = hidden_states(engine, want[f"{prompt}_ids"].tolist())
    for ours, theirs in zip(got, want[f"{prompt}_last_hidden"], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.parametrize("model", ["tiny-v2", "tiny-v3"])
def test_routing(fixtures_dir: Path, model: str) -> None:
    want = expected(fixtures_dir, model, "BF16")
    engine = loaded(gguf_path(fixtures_dir, model, "BF16"), "expanded", "exact")
    ids, weights = routing(engine, want["short_ids"].tolist())
    theirs = want["short_route_ids"]
    order, their_order = ids.argsort(axis=-1), theirs.argsort(axis=-1)
    np.testing.assert_array_equal(
        np.take_along_axis(ids, order, -1), np.take_along_axis(theirs, their_order, -1)
    )
    np.testing.assert_allclose(
        np.take_along_axis(weights, order, -1),
        np.take_along_axis(want["short_route_weights"], their_order, -1),
        rtol=1e-4,
    )
