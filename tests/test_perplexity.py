"""Perplexity and divergence: against independent programs, float64, and files of logits."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from cli.conftest import Cli, cli  # noqa: F401
from mla_backend import Model
from mla_backend.chunks import Chunks, cut, split_text
from mla_backend.errors import FormatError, UsageError
from mla_backend.likelihood import diverge, log_softmax, token_losses
from mla_backend.logits_file import LogitsFile, LogitsWriter
from mla_backend.perplexity import ModelLogits, SavedLogits, compare, measure
from model.reference_files import FILES
from reference.model import ReferenceModel
from small_models import small_model

N_CTX = 20


def random_chunks(model: Model, n_chunks: int = 3) -> Chunks:
    ids = np.random.default_rng(0).integers(0, model.config.n_vocab - 40, N_CTX * n_chunks)
    return cut(ids.tolist(), N_CTX, n_chunks, model.tokenizer)


def load(path: Path, n_ctx: int = N_CTX) -> Model:
    return Model.load(path, n_ctx=n_ctx, precision="exact", cache_type="f32", threads=2)


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize(("name", "type"), FILES)
def test_against_other_programs(fixtures_dir: Path, name: str, type: str, precision: str) -> None:
    expected = json.loads((fixtures_dir / name / "expected" / "llama_cpp.json").read_text())
    want = expected["files"][type]["perplexity"]["transformers_float32"]
    path = fixtures_dir / name / "gguf" / f"{name}-{type}.gguf"
    text = (fixtures_dir / "text.txt").read_text()
    with Model.load(path, n_ctx=512, precision=precision, cache_type="f32", threads=2) as model:
        found = measure(model, split_text(model.tokenizer, text, 512))
    limit = 1e-5 if precision == "exact" else 0.02
    assert found.perplexity.value == pytest.approx(want, rel=limit)


def test_against_float64() -> None:
    path = small_model("tiny-v3", "f32")
    with load(path) as model:
        chunks = random_chunks(model)
        found = measure(model, chunks)
    reference = ReferenceModel(path)
    losses = []
    for index, ids in enumerate(chunks.fed):
        log_p = log_softmax(reference.logits(ids.tolist()))
        at = np.arange(chunks.first_scored, N_CTX - 1)
        losses.append(-log_p[at, chunks.text[index, at + 1]])
    joined = np.concatenate(losses)
    value = np.exp(joined.mean())
    assert found.n_tokens == len(joined) == 3 * 9
    assert found.perplexity.value == pytest.approx(value, rel=1e-4)
    error = value * joined.std(ddof=1) / np.sqrt(len(joined))
    assert found.perplexity.error == pytest.approx(error, rel=1e-3)


def test_a_model_beside_itself() -> None:
    with load(small_model("tiny-v2", "q8_0")) as model:
        chunks = random_chunks(model)
        alone = measure(model, chunks)
        with ModelLogits(model, chunks) as base:
            same = compare(model, base, chunks)
    assert same.perplexity == same.base_perplexity == alone.perplexity
    assert same.kl.value == pytest.approx(0, abs=1e-12)
    assert (same.same_top.value, same.same_top.error) == (1, 0)
    assert (same.log_ratio.value, same.log_ratio.error) == (0, 0)


def test_file_and_model_say_the_same(tmp_path: Path) -> None:
    path = tmp_path / "logits"
    with load(small_model("tiny-v2", "f32")) as base, load(small_model("tiny-v2", "q8_0")) as model:
        chunks = random_chunks(base)
        measure(base, chunks, save_logits=path)
        with ModelLogits(base, chunks) as logits:
            direct = compare(model, logits, chunks)
        saved = SavedLogits(LogitsFile(path), chunks, base.config.n_vocab)
        stored = compare(model, saved, chunks)
        first = cut(chunks.text.ravel().tolist(), N_CTX, 1, base.tokenizer)
        SavedLogits(LogitsFile(path), first, base.config.n_vocab)
        other = Chunks(chunks.fed, chunks.text + 1)
        with pytest.raises(UsageError, match="another text"):
            SavedLogits(LogitsFile(path), other, base.config.n_vocab)
        with pytest.raises(UsageError, match="vocabulary"):
            SavedLogits(LogitsFile(path), chunks, 7)
    assert direct.kl.value > 0
    assert stored.kl.value == pytest.approx(direct.kl.value, rel=1e-3, abs=1e-6)
    assert stored.kl_percentiles[50.0] == pytest.approx(direct.kl_percentiles[50.0], abs=1e-5)
    assert stored.base_perplexity.value == pytest.approx(direct.base_perplexity.value, rel=1e-4)
    assert direct.perplexity == stored.perplexity


def test_layout_of_the_file(tmp_path: Path) -> None:
    """As llama.cpp reads it: rows of scale, lowest and 16-bit codes, an even number of them."""
    path, n_vocab = tmp_path / "logits", 5
    chunks = Chunks(np.arange(8, dtype=np.int32)[None], np.arange(8, dtype=np.int32)[None])
    logits = np.random.default_rng(0).normal(size=(3, n_vocab)).astype(np.float32)
    logits[1] = 0
    logits[2, 0] = -np.inf
    with LogitsWriter(path, chunks, n_vocab) as writer:
        writer.add(logits)
    data = path.read_bytes()
    assert data[:8] == b"_logits_"
    assert np.frombuffer(data[8:52], np.int32).tolist() == [8, n_vocab, 1, *range(8)]
    rows = np.frombuffer(data[52:], np.uint16).reshape(3, 4 + 6)
    scale, lowest = np.ascontiguousarray(rows[:, :4]).view(np.float32).T[:, :, None]
    decoded = scale * rows[:, 4 : 4 + n_vocab] + lowest
    want = log_softmax(logits)
    np.testing.assert_allclose(decoded[:2], want[:2], atol=1e-4)
    np.testing.assert_allclose(decoded[2, 1:], want[2, 1:], atol=2e-3)
    assert decoded[2, 0] < -99
    np.testing.assert_array_equal(LogitsFile(path).log_probs(0), decoded)


def test_bad_files_of_logits(tmp_path: Path) -> None:
    path = tmp_path / "logits"
    for data, message in [
        (b"GGUF" + bytes(100), "accepted: b'_logits_'"),
        (b"_logits_" + bytes(4), "accepted: b'_logits_'"),
        (b"_logits_" + bytes(12), "0 chunks of 0"),
        (b"_logits_" + np.array([8, 100, 9], "<i4").tobytes(), "what it announces takes"),
    ]:
        path.write_bytes(data)
        with pytest.raises(FormatError, match=message):
            LogitsFile(path)


def test_a_file_that_fails_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "logits"
    chunks = Chunks(np.zeros((1, 8), np.int32), np.zeros((1, 8), np.int32))
    with pytest.raises(KeyError), LogitsWriter(path, chunks, 5):
        raise KeyError
    assert not list(tmp_path.iterdir())


def test_divergence() -> None:
    rng = np.random.default_rng(0)
    base, logits = (rng.normal(size=(50, 300)).astype(np.float32) * 4 for _ in range(2))
    base[3, 7] = -np.inf  # impossible in the base: it counts nothing
    targets = rng.integers(8, 300, 50).astype(np.int32)
    p = np.exp(base.astype(np.float64))
    p /= p.sum(axis=1, keepdims=True)
    q = np.exp(logits.astype(np.float64))
    q /= q.sum(axis=1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        kl = np.where(p > 0, p * np.log(p / q), 0).sum(axis=1)
    found = diverge(base, logits, targets)
    np.testing.assert_allclose(found.kl, kl, rtol=1e-10)
    np.testing.assert_allclose(found.losses, -np.log(q[np.arange(50), targets]), rtol=1e-10)
    np.testing.assert_allclose(found.base_losses, token_losses(base, targets), rtol=0)
    np.testing.assert_array_equal(found.same_top, p.argmax(axis=1) == q.argmax(axis=1))


def test_command(cli: Cli, tmp_path: Path) -> None:  # noqa: F811
    text, logits = tmp_path / "t.txt", tmp_path / "logits"
    text.write_text("Some words, and then some more words: one two three four five. " * 12)
    model, base = small_model("tiny-v2", "q8_0"), small_model("tiny-v2", "f32")
    options = ["-c", 32, "--chunks", 2]
    plain = cli("perplexity", base, text, *options, "--save-logits", logits)
    assert plain.status == 0, plain.err
    assert "perplexity" in plain.out
    found = [
        json.loads(cli("perplexity", model, text, *options, "--json", "--kl-divergence", ref).out)
        for ref in (base, logits)
    ]
    for result in found:
        assert (result["chunks"], result["chunk_size"], result["n_tokens"]) == (2, 32, 30)
        assert result["kl"]["value"] == pytest.approx(found[0]["kl"]["value"], rel=1e-3, abs=1e-6)
        assert result["kl_percentiles"]["50.0"] <= result["kl_max"]
    shown = cli("perplexity", model, text, *options, "--kl-divergence", logits)
    assert "same likeliest" in shown.out
    assert "median" in shown.out


def test_what_is_wrong_with_a_command_line(cli: Cli, tmp_path: Path) -> None:  # noqa: F811
    model, text = small_model("tiny-v2", "q8_0"), tmp_path / "t.txt"
    text.write_bytes(b"word \xff")
    bad = cli("perplexity", model, text)
    assert (bad.status, "byte 5 (0xff) is not valid UTF-8" in bad.err) == (2, True)
    text.write_text("word " * 20)
    short = cli("perplexity", model, text)
    assert (short.status, "of one chunk" in short.err) == (2, True)
    both = cli("perplexity", model, text, "--save-logits", "a", "--kl-divergence", "b")
    assert both.status == 2
    over = cli("perplexity", model, text, "-c", "16", "--save-logits", text)
    assert (over.status, "holds no log-probabilities" in over.err) == (2, True)
    other = small_model("tiny-v3", "q8_0")  # its special tokens stand elsewhere
    foreign = cli("perplexity", model, text, "-c", "16", "--kl-divergence", other)
    assert (foreign.status, "accepted: equal vocabularies" in foreign.err) == (2, True)
    absent = cli("perplexity", model, tmp_path / "none.txt")
    assert (absent.status, "none.txt: No such file" in absent.err) == (1, True)
