"""Importance: every weight's sums against float64, the file, experts that nothing met."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from cli.conftest import Cli, cli  # noqa: F401
from gguf import GGUFReader
from mla_backend import Model
from mla_backend.chunks import Chunks, cut, split_text
from mla_backend.errors import FormatError, UsageError
from mla_backend.gguf.writer import NewTensor, write_gguf
from mla_backend.imatrix import Collection, collect, coverage
from mla_backend.imatrix_file import Importance, InputSums, read_importance, write_importance
from reference.model import ReferenceModel
from small_models import small_model

N_CTX, N_CHUNKS = 24, 2


def random_chunks(model: Model) -> Chunks:
    ids = np.random.default_rng(0).integers(0, model.config.n_vocab - 40, N_CTX * N_CHUNKS)
    return cut(ids.tolist(), N_CTX, N_CHUNKS, model.tokenizer)


def collected(path: Path, *, n_batch: int = 512, threads: int = 2) -> tuple[Collection, Chunks]:
    with Model.load(
        path,
        n_ctx=N_CTX,
        precision="exact",
        cache_type="f32",
        attention="absorbed",
        n_batch=n_batch,
        threads=threads,
    ) as model:
        chunks = random_chunks(model)
        return collect(model, chunks, ["random"]), chunks


def stored_weights(path: Path) -> set[str]:
    """Names of the weights of products: all with rows, but for the embedding."""
    return {
        tensor.name
        for tensor in GGUFReader(path).tensors
        if len(tensor.shape) > 1 and tensor.name != "token_embd.weight"
    }


@pytest.mark.parametrize("shape", ["tiny-v2", "tiny-v3", "tiny-dense"])
def test_every_weight_against_float64(shape: str) -> None:
    path = small_model(shape, "f32")
    found, chunks = collected(path)
    reference = ReferenceModel(path)
    for ids in chunks.fed:
        reference.logits(ids.tolist())
    weights = found.importance.weights
    assert stored_weights(path) <= weights.keys() == reference.squares.keys()
    for name, met in weights.items():
        by_matrix = reference.squares[name]
        n_matrices = max(by_matrix) + 1
        n_matrices = len(met.counts) if "_exps" in name else n_matrices
        want = np.stack([by_matrix.get(i, np.zeros(1)) + np.zeros(
            len(next(iter(by_matrix.values())))) for i in range(n_matrices)])  # fmt: skip
        np.testing.assert_allclose(met.sums.reshape(want.shape), want, rtol=2e-3, atol=1e-4)
        rows = [reference.rows[name].get(i, 0) for i in range(n_matrices)]
        assert met.counts.tolist() == (rows if "_exps" in name else rows[:1]), name


def test_heads_lie_in_one_row() -> None:
    found, _ = collected(small_model("tiny-v2", "f32"))
    k_b, v_b = (found.importance.weights[f"blk.0.attn_{name}_b.weight"] for name in "kv")
    assert k_b.sums.shape == (1, 4 * 128)
    assert v_b.sums.shape == (1, 4 * 256)
    assert k_b.counts.tolist() == v_b.counts.tolist() == [N_CTX * N_CHUNKS]


def test_neither_batches_nor_threads_matter() -> None:
    path = small_model("tiny-v3", "q8_0")
    first, _ = collected(path, threads=1)
    same, _ = collected(path, threads=2)
    split, _ = collected(path, n_batch=7)
    assert first.perplexity == same.perplexity
    for name, met in first.importance.weights.items():
        assert met.sums.tobytes() == same.importance.weights[name].sums.tobytes()
        other = split.importance.weights[name]
        np.testing.assert_allclose(met.sums, other.sums, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(met.counts, other.counts)


def test_legacy_layout() -> None:
    found, _ = collected(small_model("tiny-v2", "f32", "legacy"))
    split, _ = collected(small_model("tiny-v2", "f32"))
    kv_b = found.importance.weights["blk.0.attn_kv_b.weight"]
    assert kv_b.sums.shape == (1, 256)
    assert "blk.0.attn_k_b.weight" not in found.importance.weights
    name = "blk.0.ffn_down.weight"
    assert found.importance.weights[name].sums.shape == split.importance.weights[name].sums.shape


def test_an_observer_changes_no_logits() -> None:
    path = small_model("tiny-v3", "f32")
    with Model.load(path, n_ctx=N_CTX, precision="exact", attention="absorbed") as model:
        ids = random_chunks(model).fed[0].tolist()
        with model.session(observer=lambda *_: None) as session:
            seen = session.feed(ids, outputs=len(ids))
        np.testing.assert_allclose(seen, model.logits(ids), atol=1e-3)


# ---- the file ------------------------------------------------------------------------------------


def sample() -> Importance:
    experts = InputSums(np.arange(12, dtype=np.float32).reshape(3, 4), np.array([2, 0, 5.0]))
    dense = InputSums(np.ones((1, 8), np.float32), np.array([7.0], np.float32))
    weights = {"blk.1.ffn_down_exps.weight": experts, "output.weight": dense}
    return Importance(weights, ("a.txt",), 3, 512)


def test_file_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "i.gguf"
    write_importance(path, sample())
    read = read_importance(path)
    assert (read.datasets, read.n_chunks, read.chunk_size) == (("a.txt",), 3, 512)
    assert read.weights.keys() == sample().weights.keys()
    for name, met in sample().weights.items():
        np.testing.assert_array_equal(read.weights[name].sums, met.sums)
        np.testing.assert_array_equal(read.weights[name].counts, met.counts)
    assert [(row.layer, row.unseen, row.fewest) for row in coverage(read)] == [(1, (1,), 0)]


def test_file_as_others_see_it(tmp_path: Path) -> None:
    path = tmp_path / "i.gguf"
    write_importance(path, sample())
    reader = GGUFReader(path)
    assert reader.fields["general.type"].contents() == "imatrix"
    assert reader.fields["imatrix.datasets"].contents() == ["a.txt"]
    assert reader.fields["imatrix.chunk_count"].contents() == 3
    assert reader.fields["imatrix.chunk_size"].contents() == 512
    shapes = {tensor.name: tensor.shape.tolist() for tensor in reader.tensors}
    assert shapes == {  # innermost first
        "blk.1.ffn_down_exps.weight.in_sum2": [4, 3],
        "blk.1.ffn_down_exps.weight.counts": [1, 3],
        "output.weight.in_sum2": [8, 1],
        "output.weight.counts": [1, 1],
    }


def bad_files() -> Iterator[tuple[dict[str, tuple[tuple[int, ...], float]], str, str]]:
    good: dict[str, tuple[tuple[int, ...], float]] = {
        "w.in_sum2": ((2, 4), 1.0),
        "w.counts": ((2, 1), 1.0),
    }
    yield good, "model", "general.type is 'model'"
    yield {}, "imatrix", "holds no importance"
    yield {"w.in_sum2": ((2, 4), 1.0)}, "imatrix", ".counts is missing"
    yield {"w.counts": ((2, 1), 1.0)}, "imatrix", ".in_sum2 is missing"
    yield good | {"w.counts": ((3, 1), 1.0)}, "imatrix", "one for each row of sums"
    yield good | {"w.in_sum2": ((2, 4), -1.0)}, "imatrix", "negative or not finite"
    yield good | {"w.in_sum2": ((2, 4), float("nan"))}, "imatrix", "negative or not finite"


@pytest.mark.parametrize(("arrays", "kind", "message"), list(bad_files()))
def test_bad_files(
    tmp_path: Path, arrays: dict[str, tuple[tuple[int, ...], float]], kind: str, message: str
) -> None:
    path = tmp_path / "i.gguf"
    tensors = [NewTensor(name, "F32", shape) for name, (shape, _) in arrays.items()]
    write_gguf(
        path,
        {"general.type": kind},
        tensors,
        lambda tensor: [
            np.full(tensor.n_bytes // 4, arrays[tensor.name][1], np.float32).view(np.uint8)
        ],
    )
    with pytest.raises(FormatError, match=message):
        read_importance(path)


# ---- text and command ----------------------------------------------------------------------------


def test_chunks() -> None:
    with Model.load(small_model("tiny-v2", "q8_0"), n_ctx=64) as model:
        tokenizer = model.tokenizer
        text = "The quick brown fox <|end_of_sentence|> jumps over 12345 lazy dogs. " * 9
        ids = tokenizer.encode(text, parse_special=False)
        chunks = split_text(tokenizer, text, 16)
        assert len(chunks) == len(ids) // 16
        np.testing.assert_array_equal(chunks.text.ravel(), ids[: 16 * len(chunks)])
        assert tokenizer.add_bos
        assert (chunks.fed[:, 0] == tokenizer.bos_id).all()
        np.testing.assert_array_equal(chunks.fed[:, 1:], chunks.text[:, 1:])
        assert chunks.targets(0).tolist() == chunks.text[0, 9:].tolist()
        assert len(split_text(tokenizer, text, 16, 2)) == 2
        with pytest.raises(UsageError, match="accepted: at least the 4096 of one chunk"):
            split_text(tokenizer, text, 4096)


@pytest.mark.parametrize("as_json", [False, True])
def test_command(cli: Cli, tmp_path: Path, as_json: bool) -> None:  # noqa: F811
    text, out = tmp_path / "t.txt", tmp_path / "i.gguf"
    text.write_text("Some words, and then some more words: one two three four five. " * 12)
    model = small_model("tiny-v3", "q8_0")
    arguments = ["imatrix", model, text, "-o", out, "-c", 32, "--chunks", 2, "--save-every", 1]
    result = cli(*arguments, *(["--json"] if as_json else []))
    assert result.status == 0, result.err
    read = read_importance(out)
    assert stored_weights(model) <= read.weights.keys()
    assert (read.n_chunks, read.chunk_size, read.datasets) == (2, 32, ("t.txt",))
    if as_json:
        assert [row["layer"] for row in json.loads(result.out)["coverage"]] == [1, 2]
    else:
        assert "2 chunks of 32 tokens" in result.out
        assert "experts were" in result.out
    again = cli(*arguments)
    assert again.status == 2
    assert "--force replaces it" in again.err
