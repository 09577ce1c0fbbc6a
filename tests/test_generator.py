"""Generation: what is chosen, how the text is cut, when it ends, what is kept."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from mla_backend import CancelToken, Chunk, Model, SamplingParams
from mla_backend.errors import ContextError, ShapeError, TokenizerError, UsageError
from small_models import small_model

Floats = npt.NDArray[np.float32]
N_CTX = 192
N_BATCH = 32
PROMPT = list(range(40, 60))


@pytest.fixture(scope="module")
def shared() -> Iterator[Model]:
    path = small_model("tiny-v2", "q8_0", n_layer=2)
    with Model.load(path, n_ctx=N_CTX, n_batch=N_BATCH, threads=2) as model:
        yield model


@pytest.fixture
def model(shared: Model) -> Model:
    """The shared model with nothing in its context."""
    shared._session.truncate(0)
    shared._session.sampler_state = None
    return shared


class Script:
    """A logits processor that makes the model say these tokens, whatever it computes."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._rest = list(tokens)

    def __call__(self, history: Sequence[int], logits: Floats) -> Floats:
        out = np.full_like(logits, -np.inf)
        out[self._rest.pop(0)] = 0.0
        return out


def spell(model: Model, data: bytes) -> list[int]:
    """One token for each byte."""
    ids = {model.tokenizer.token_bytes(i): i for i in range(model.config.n_vocab)}
    return [ids[bytes([byte])] for byte in data]


def say(model: Model, text: str, **options: Any) -> list[Chunk]:
    """The chunks of a stream that says ``text`` and then the end token, byte by byte."""
    spelled = spell(model, text.encode())
    script = Script([*spelled, min(model.tokenizer.eos_ids)])
    return list(model.stream(PROMPT, logits_processors=[script], temperature=0.0, **options))


# ---- choice --------------------------------------------------------------------------------------


def test_greedy_takes_the_best_token_every_time(model: Model) -> None:
    def tokens(model: Model) -> tuple[int, ...]:
        return model.generate(PROMPT, temperature=0.0, max_tokens=12, ignore_eos=True).tokens

    assert len(tokens(model)) == 12
    assert tokens(model) == tokens(model)
    with Model.load(model.file.paths[0], n_ctx=N_CTX, threads=2, precision="exact") as exact:
        want = tokens(exact)
        logits = exact.logits([*PROMPT, *want])
    assert tuple(logits[len(PROMPT) - 1 : -1].argmax(axis=1)) == want


def test_seeds(model: Model) -> None:
    def tokens(seed: int) -> tuple[int, ...]:
        return model.generate(PROMPT, seed=seed, temperature=1.5, top_k=0, max_tokens=16).tokens

    first = tokens(7)
    assert tokens(7) == first
    assert tokens(8) != first


def test_text_and_ids_are_the_same_prompt(model: Model) -> None:
    text = "the light of the moon"
    by_text = model.generate(text, temperature=0.0, max_tokens=5)
    by_ids = model.generate(model.tokenizer.encode(text), temperature=0.0, max_tokens=5)
    as_array = model.generate(np.array(model.tokenizer.encode(text)), temperature=0.0, max_tokens=5)
    assert by_text.tokens == by_ids.tokens == as_array.tokens
    assert all(type(token) is int for token in as_array.tokens)


def test_logprobs_are_those_of_the_logits(model: Model) -> None:
    got = model.generate(PROMPT, seed=3, temperature=2.0, max_tokens=8, logprobs=4, ignore_eos=True)
    logits = model.logits([*PROMPT, *got.tokens])[len(PROMPT) - 1 : -1].astype(np.float64)
    want = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    chosen = want[np.arange(8), list(got.tokens)]
    # Decoding and prefill round differently under ``fast``.
    assert np.abs(chosen - got.logprobs).max() < 1.0
    assert np.median(np.abs(chosen - got.logprobs)) < 0.3
    for top in got.top_logprobs:
        assert len(top) == 4
        assert [logprob for _, logprob in top] == sorted((p for _, p in top), reverse=True)
        assert sum(np.exp(logprob) for _, logprob in top) <= 1


def test_logits_processors_see_everything(model: Model) -> None:
    seen: list[list[int]] = []

    def forbid_best(history: Sequence[int], logits: Floats) -> Floats:
        seen.append(list(history))
        logits[logits.argmax()] = -np.inf
        return logits

    plain = model.generate(PROMPT, temperature=0.0, max_tokens=3, ignore_eos=True, logprobs=2)
    got = model.generate(
        PROMPT,
        temperature=0.0,
        max_tokens=3,
        ignore_eos=True,
        logits_processors=[forbid_best],
    )
    assert got.tokens[0] == plain.top_logprobs[0][1][0]
    assert seen == [[*PROMPT, *got.tokens[:n]] for n in range(3)]


# ---- ends ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, 1, 5])
def test_max_tokens(model: Model, n: int) -> None:
    chunks = list(model.stream(PROMPT, max_tokens=n, temperature=0.0, ignore_eos=True))
    assert [chunk.token is not None for chunk in chunks] == ([True] * n or [False])
    assert [chunk.finish_reason for chunk in chunks] == [None] * (n - 1) + ["length"]
    assert chunks[-1].stats.n_generated == n


def test_end_token(model: Model) -> None:
    chunks = say(model, "ab")
    assert "".join(chunk.text for chunk in chunks) == "ab"
    assert chunks[-1].finish_reason == "stop"
    assert chunks[-1].token in model.tokenizer.eos_ids


def test_end_token_can_be_ignored(model: Model) -> None:
    end = min(model.tokenizer.eos_ids)
    script = Script([end, end, end])
    got = model.generate(PROMPT, max_tokens=3, ignore_eos=True, logits_processors=[script])
    assert (got.tokens, got.finish_reason) == ((end,) * 3, "length")


def test_context_ends_the_answer(model: Model) -> None:
    prompt = [5] * (N_CTX - 3)
    got = model.generate(prompt, temperature=0.0, ignore_eos=True)
    assert (len(got.tokens), got.finish_reason) == (3, "length")
    got = model.generate([5] * N_CTX, temperature=0.0)
    assert (len(got.tokens), got.finish_reason) == (0, "length")


def test_wrong_prompts_are_errors_before_the_stream(model: Model) -> None:
    for prompt, error in ([], UsageError), ("", UsageError), ([5] * (N_CTX + 1), ContextError):
        with pytest.raises(error):
            model.stream(prompt)
    with pytest.raises(UsageError, match="conversation is empty"):
        model.stream_chat([])


def test_too_long_prompt_is_an_error_before_computing(model: Model) -> None:
    calls: list[Any] = []
    with pytest.raises(ContextError, match=f"{N_CTX + 1} tokens exceeds the context of {N_CTX}"):
        model.generate([5] * (N_CTX + 1), on_progress=lambda *args: calls.append(args))
    with pytest.raises(ContextError):
        model.logits([5] * (N_CTX + 1), on_progress=lambda *args: calls.append(args))
    assert calls == []


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m.generate([]), UsageError, "prompt is empty"),
        (lambda m: m.logits([]), ShapeError, "give 1 token or more"),
        (lambda m: m.generate([1, 1024]), ShapeError, "token id 1024; accepted are 0 to 1023"),
        (lambda m: m.logits([-1]), ShapeError, "token id -1"),
        (lambda m: m.generate([1], max_tokens=-1), UsageError, "max_tokens -1"),
        (lambda m: m.generate([1], temprature=1), UsageError, "unknown option temprature"),
        (lambda m: m.generate([1], temperature=-1.0), UsageError, "temperature is -1.0"),
    ],
)
def test_wrong_requests(
    model: Model, call: Callable[[Model], object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call(model)
    assert len(model.generate(PROMPT, max_tokens=2, ignore_eos=True).tokens) == 2


# ---- text ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["plain", "naïve", "世界 and 🎉!", "é"])
def test_characters_are_never_cut(model: Model, text: str) -> None:
    chunks = say(model, text)
    assert [chunk.text for chunk in chunks if chunk.text] == list(text)


def test_incomplete_character_at_the_end(model: Model) -> None:
    script = Script(spell(model, b"\xf0"))
    got = model.generate(PROMPT, max_tokens=1, logits_processors=[script])
    assert got.text == "\ufffd"


@pytest.mark.parametrize(
    ("text", "stops", "want"),
    [
        ("one STOP two", ["STOP"], "one "),
        ("one\n\ntwo", "\n\n", "one"),
        ("one STO two", ["STOP"], "one STO two"),
        ("日本語です", ["語で"], "日本"),
    ],
)
def test_stop_strings_across_tokens(model: Model, text: str, stops: Any, want: str) -> None:
    chunks = say(model, text, stop=stops)
    assert "".join(chunk.text for chunk in chunks) == want
    assert chunks[-1].finish_reason == "stop"
    # Nothing of a stop string is shown before it is known to be none.
    assert all(want.startswith("".join(c.text for c in chunks[:n])) for n in range(len(chunks)))


# ---- what is kept --------------------------------------------------------------------------------


def test_common_prefix_is_not_computed_again(model: Model) -> None:
    first = model.generate(PROMPT, temperature=0.0, max_tokens=4, ignore_eos=True)
    assert (first.stats.n_prompt, first.stats.n_reused) == (20, 0)
    longer = [*PROMPT, *first.tokens, 7, 8]
    second = model.generate(longer, temperature=0.0, max_tokens=4, ignore_eos=True)
    assert second.stats.n_reused == 23  # the last token chosen was not computed yet
    again = model.generate(PROMPT, temperature=0.0, max_tokens=4, ignore_eos=True)
    assert again.stats.n_reused == 19  # the last one gives the logits
    assert model.generate(PROMPT, max_tokens=4).stats.n_reused == 20  # unless they are kept
    other = model.generate([*PROMPT[:5], 3, 4], max_tokens=1)
    assert other.stats.n_reused == 5


def test_stats(model: Model) -> None:
    stats = model.generate(PROMPT, max_tokens=5, temperature=0.0, ignore_eos=True).stats
    assert (stats.n_prompt, stats.n_generated) == (20, 5)
    assert stats.prompt_tps == pytest.approx(20 / stats.prompt_seconds)
    assert stats.generation_tps == pytest.approx(4 / stats.generation_seconds)


def test_progress(model: Model) -> None:
    seen: list[tuple[str, int, int]] = []
    model.generate([5] * 80, max_tokens=1, on_progress=lambda *args: seen.append(args))
    assert seen == [("prefill", n, 80) for n in (0, 32, 64, 80)]


def test_cancel_during_prefill_keeps_the_finished_chunks(model: Model) -> None:
    """From another thread; a retry goes on from there."""
    cancel, reached, cancelled = CancelToken(), threading.Event(), threading.Event()

    def stop() -> None:
        reached.wait(30)
        cancel.cancel()
        cancelled.set()

    def progress(phase: str, done: int, total: int) -> None:
        if done == 2 * N_BATCH:
            reached.set()
            cancelled.wait(30)

    thread = threading.Thread(target=stop)
    thread.start()
    prompt = list(range(5, 155))
    chunks = list(model.stream(prompt, cancel=cancel, on_progress=progress, max_tokens=3))
    thread.join()
    assert [(chunk.token, chunk.finish_reason) for chunk in chunks] == [(None, "cancelled")]
    assert model._session.tokens == prompt[: 2 * N_BATCH]
    cancel.reset()
    retry = model.generate(prompt, cancel=cancel, max_tokens=3, temperature=0.0)
    assert retry.stats.n_reused == 2 * N_BATCH


def test_cancel_while_decoding(model: Model) -> None:
    cancel = CancelToken()
    stream = model.stream(PROMPT, cancel=cancel, temperature=0.0, ignore_eos=True)
    tokens = [next(stream).token for _ in range(4)]
    cancel.cancel()
    rest = list(stream)
    assert [chunk.finish_reason for chunk in rest] == ["cancelled"]
    assert model._session.tokens == [*PROMPT, *tokens[:3]]
    again = model.generate(PROMPT, temperature=0.0, max_tokens=4, ignore_eos=True)
    assert list(again.tokens) == tokens


def test_closed_stream_frees_the_model(model: Model) -> None:
    stream = model.stream(PROMPT, max_tokens=50)
    next(stream)
    stream.close()
    assert model.generate(PROMPT, max_tokens=1).stats.n_reused == 20


# ---- several callers -----------------------------------------------------------------------------


def test_open_stream_in_the_same_thread_is_an_error(model: Model) -> None:
    stream = model.stream(PROMPT, max_tokens=5, temperature=0.0, ignore_eos=True)
    next(stream)
    for call in (lambda: model.generate(PROMPT), lambda: model.logits(PROMPT), model.close):
        with pytest.raises(UsageError, match="still open in this thread"):
            call()
    assert len(list(stream)) == 4


def test_threads_wait_for_each_other(model: Model) -> None:
    prompts = [[10 + i, *PROMPT] for i in range(3)]
    alone = [model.generate(p, temperature=0.0, max_tokens=6, ignore_eos=True) for p in prompts]
    results: dict[int, list[tuple[int, ...]]] = {}

    def work(index: int) -> None:
        results[index] = [
            model.generate(prompts[index], temperature=0.0, max_tokens=6, ignore_eos=True).tokens
            for _ in range(4)
        ]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == {i: [alone[i].tokens] * 4 for i in range(3)}


def test_chat(model: Model) -> None:
    messages = [{"role": "user", "content": "What is the light of the moon?"}]
    got = model.chat(messages, max_tokens=4, temperature=0.0, ignore_eos=True)
    assert len(got.tokens) == 4
    chunks = list(model.stream_chat(messages, max_tokens=4, temperature=0.0, ignore_eos=True))
    assert tuple(chunk.token for chunk in chunks) == got.tokens
    assert chunks[-1].stats.n_prompt > 10


def test_sampling_can_be_given_as_a_whole(model: Model) -> None:
    sampling = SamplingParams(temperature=1.0, seed=5, top_k=0)
    got = model.generate(PROMPT, sampling=sampling, max_tokens=8)
    spelled_out = model.generate(PROMPT, temperature=1.0, seed=5, top_k=0, max_tokens=8)
    assert got.tokens == spelled_out.tokens
    greedy = model.generate(PROMPT, sampling=sampling, temperature=0.0, max_tokens=8)
    assert greedy.tokens == model.generate(PROMPT, temperature=0.0, max_tokens=8).tokens


def test_ids_work_without_a_known_tokenizer(model: Model, tmp_path: Path) -> None:
    """Its pre-tokenizer is renamed in the file: text is an error, ids are not."""
    path = tmp_path / "unknown.gguf"
    data = model.file.paths[0].read_bytes()
    assert data.count(b"deepseek-llm") == 1
    path.write_bytes(data.replace(b"deepseek-llm", b"deepseek-xyz"))
    want = model.generate(PROMPT, temperature=0.0, max_tokens=4, ignore_eos=True)
    with Model.load(path, n_ctx=N_CTX, n_batch=N_BATCH, threads=2) as unknown:
        assert any("deepseek-xyz" in note for note in unknown.notes)
        got = unknown.generate(PROMPT, temperature=0.0, max_tokens=4, ignore_eos=True)
        with pytest.raises(TokenizerError, match="deepseek-xyz"):
            unknown.generate("text")
    assert got.tokens == want.tokens


def test_closed_model(model: Model) -> None:
    other = Model.load(model.file.paths[0], n_ctx=64, threads=1)
    session = other.session()
    other.close()
    other.close()
    with pytest.raises(UsageError, match="model is closed"):
        other.generate(PROMPT)
    assert session.feed(PROMPT).shape == (1, 1024)
