"""Whole files: types as llama.cpp chooses them, bytes, metadata, importance, refusals, resuming."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from convert.files import floats, keys, raw
from mla_backend import _core
from mla_backend.errors import FormatError, ModelError, UsageError
from mla_backend.gguf import read_gguf
from mla_backend.gguf.writer import NewTensor, write_gguf
from mla_backend.imatrix_file import Importance, InputSums, write_importance
from mla_backend.quantize import parse_override, plan, plan_quantization, quantize_file
from quantize.models import LETTERS, MODELS, REFERENCE, model

Columns = dict[str, np.ndarray[Any, np.dtype[np.float32]]]


@pytest.fixture(scope="module")
def bf16() -> Path:
    return model("tied")


def importance_of(path: Path, seed: int = 0) -> Columns:
    """Random importance [matrices, K] of all matrices but the embedding."""
    rng = np.random.default_rng(seed)
    return {
        name: np.exp(rng.standard_normal((int(np.prod(info.shape[:-2])), info.shape[-1]))).astype(
            np.float32
        )
        for name, info in read_gguf(path).tensors.items()
        if len(info.shape) > 1 and not name.startswith("token_embd")
    }


def write_columns(path: Path, columns: Columns) -> Path:
    """As a file of today: sums over eight inputs."""
    weights = {n: InputSums(8 * c, np.full(len(c), 8, np.float32)) for n, c in columns.items()}
    write_importance(path, Importance(weights, ("the text",), 3, 512))
    return path


def write_list(path: Path, columns: Columns, *, tail: bool = True) -> Path:
    """As a file from before: mean squares times the calls."""
    parts = [struct.pack("<i", len(columns))]
    for name, values in columns.items():
        encoded = name.encode()
        parts += [struct.pack("<i", len(encoded)), encoded, struct.pack("<ii", 4, values.size)]
        parts.append((values * np.float32(4)).tobytes())
    if tail:
        parts += [struct.pack("<ii", 3, 8), b"the text"]
    path.write_bytes(b"".join(parts))
    return path


# ---- types ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_types_are_those_of_llama_cpp(name: str, tmp_path: Path) -> None:
    reference = json.loads(Path(__file__).with_name(REFERENCE).read_text())[name]
    guide = write_columns(tmp_path / "guide.gguf", importance_of(model(name)))
    assert len(reference) > 30
    for key, letters in reference.items():
        type, _, guided = key.partition(" with ")
        made = plan_quantization(
            model(name), tmp_path / "o.gguf", type, imatrix=guide if guided else None
        )
        got = {tensor.name: tensor.format for tensor in made.output.tensors}
        expected = [LETTERS[letter] for letter in letters]
        assert [got[name] for name in sorted(got)] == expected, key


def test_overrides(bf16: Path, tmp_path: Path) -> None:
    texts = ["ffn_down_exps=q6_k", r"blk\.1\.ffn_(gate|up)_exps=Q2_K", "ffn_gate=q8_0", "norm=q8_0"]
    made = quantize_file(
        bf16, tmp_path / "o.gguf", "q4_k_m", overrides=[parse_override(text) for text in texts]
    )
    got = {name: info.format for name, info in read_gguf(tmp_path / "o.gguf").tensors.items()}
    # Rows of 64 fill no block of Q6_K.
    assert got["blk.1.ffn_down_exps.weight"] == "Q8_0"
    assert got["blk.1.ffn_gate_exps.weight"] == got["blk.1.ffn_up_exps.weight"] == "Q2_K"
    assert got["blk.0.ffn_gate.weight"] == "Q8_0"
    assert got["blk.1.attn_norm.weight"] == got["blk.1.ffn_gate_inp.weight"] == "F32"
    assert got["blk.0.ffn_up.weight"] == "Q4_K"
    assert not any("is called" in note for note in made.notes)
    idle = plan_quantization(
        bf16, tmp_path / "p.gguf", "q4_k_m", overrides=[parse_override("no_such=q8_0")]
    )
    assert "no tensor is called 'no_such'" in idle.notes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("q8_0", "accepted is PATTERN=TYPE"),
        ("=q8_0", "accepted is PATTERN=TYPE"),
        ("a=q9_0", "'q9_0' is unknown"),
        ("a=i32", "no format of weights"),
        ("(=q8_0", "the pattern is invalid"),
    ],
)
def test_overrides_that_mean_nothing(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        parse_override(text)


# ---- bytes and metadata --------------------------------------------------------------------------
@pytest.mark.parametrize("type", ["q8_0", "q4_k_m", "q2_k", "iq4_xs", "f16", "f32"])
def test_bytes_are_those_of_the_encoders(bf16: Path, tmp_path: Path, type: str) -> None:
    out = tmp_path / "o.gguf"
    quantize_file(bf16, out, type)
    wide, written = floats(bf16), raw(out)
    for name, (format, _, data) in written.items():
        source = np.ascontiguousarray(wide[name]).reshape(-1, wide[name].shape[-1])
        assert data == _core.quantize(source, format).tobytes(), name


def test_metadata(bf16: Path, tmp_path: Path) -> None:
    guide = write_columns(tmp_path / "guide.gguf", importance_of(bf16))
    out = tmp_path / "o.gguf"
    quantize_file(bf16, out, "q5_k_m", imatrix=guide)
    before, after = keys(bf16), keys(out)
    changed = {name for name in after if before.get(name) != after[name]}
    told = {name: after[name][1] for name in changed}
    assert told == {
        "general.file_type": 17,
        "quantize.imatrix.file": str(guide),
        "quantize.imatrix.dataset": "the text",
        "quantize.imatrix.entries_count": len(importance_of(bf16)),
        "quantize.imatrix.chunks_count": 3,
    }
    assert list(after)[-5] == "general.file_type"
    assert after["general.quantization_version"][1] == 2
    assert not set(before) - set(after)


def test_types_of_numbers_are_kept(tmp_path: Path) -> None:
    metadata = {
        "general.architecture": "deepseek2",
        "a.i8": np.int8(-3),
        "a.i32": np.int32(5),
        "a.u64": np.uint64(7),
        "a.f64": np.float64(0.1),
        "a.true": True,
        "a.flags": np.array([True, False]),
        "a.shorts": np.array([1, 2], np.int16),
        "a.words": ("x", "y"),
    }
    source, out = tmp_path / "i.gguf", tmp_path / "o.gguf"
    tensor = NewTensor("token_embd.weight", "F32", (4, 256))
    data = np.zeros(tensor.n_bytes, np.uint8)
    write_gguf(source, metadata, [tensor], lambda _: [data])
    quantize_file(source, out, "q8_0")
    before, after = keys(source), keys(out)
    assert {name: after[name] for name in before} == before


def test_what_has_its_format_is_copied(tmp_path: Path) -> None:
    source = tmp_path / "q8.gguf"
    quantize_file(model("tied"), source, "q8_0")
    out = tmp_path / "again.gguf"
    quantize_file(source, out, "q8_0")  # needs no permission: nothing is quantized again
    assert raw(out) == raw(source)


def test_shards(bf16: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole.gguf"
    quantize_file(bf16, whole, "q4_k_m")
    made = quantize_file(bf16, tmp_path / "o.gguf", "q4_k_m", max_shard_bytes=300_000)
    assert len(made.output.paths) > 2
    again = tmp_path / "again.gguf"
    quantize_file(made.output.paths[1], again, "q4_k_m")  # copies, from shards
    assert again.read_bytes() == whole.read_bytes()


def test_threads_and_pieces_change_nothing(
    bf16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize_file(bf16, tmp_path / "a.gguf", "q4_k_m", threads=1)
    monkeypatch.setattr(plan, "PIECE_ELEMS", 1000)
    monkeypatch.setattr(plan, "_COPY_BYTES", 100)
    quantize_file(bf16, tmp_path / "b.gguf", "q4_k_m", threads=3)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_goes_on_after_an_interruption(
    bf16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize_file(bf16, tmp_path / "whole.gguf", "q4_k_m")
    monkeypatch.setattr(plan, "PIECE_ELEMS", 20_000)
    out = tmp_path / "o.gguf"
    calls: list[int] = []

    def stop(phase: str, done: int, total: int) -> None:
        calls.append(done)
        if len(calls) == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_file(bf16, out, "q4_k_m", on_progress=stop)
    assert not out.exists()
    calls.clear()
    quantize_file(bf16, out, "q4_k_m", on_progress=lambda phase, done, total: calls.append(done))
    assert calls[0] > 0
    assert out.read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert not list(tmp_path.glob(".*"))


# ---- importance ----------------------------------------------------------------------------------
def test_importance_reaches_each_matrix(bf16: Path, tmp_path: Path) -> None:
    columns = importance_of(bf16)
    columns["blk.1.ffn_up_exps.weight"][3] = 0
    del columns["blk.0.ffn_up.weight"]
    guide = write_columns(tmp_path / "guide.gguf", columns)
    out = tmp_path / "o.gguf"
    quantize_file(bf16, out, "q4_k_m", imatrix=guide)
    wide, written = floats(bf16), raw(out)
    for name, (format, _, data) in written.items():
        source = np.ascontiguousarray(wide[name])
        matrices = source.reshape(-1, *source.shape[-2:]) if source.ndim > 1 else source[None, None]
        weights = columns.get(name, [None] * len(matrices))
        expected = [
            _core.quantize(matrix, format, weight).tobytes()
            for matrix, weight in zip(matrices, weights, strict=True)
        ]
        assert data == b"".join(expected), name


@pytest.mark.parametrize("tail", [True, False])
def test_old_files_of_importance(bf16: Path, tmp_path: Path, tail: bool) -> None:
    columns = importance_of(bf16)
    today = write_columns(tmp_path / "guide.gguf", columns)
    before = write_list(tmp_path / "guide.dat", columns, tail=tail)
    quantize_file(bf16, tmp_path / "a.gguf", "q3_k_m", imatrix=today)
    quantize_file(bf16, tmp_path / "b.gguf", "q3_k_m", imatrix=before)
    assert raw(tmp_path / "a.gguf") == raw(tmp_path / "b.gguf")
    assert keys(tmp_path / "b.gguf")["quantize.imatrix.chunks_count"][1] == (3 if tail else 0)


def test_notes(bf16: Path, tmp_path: Path) -> None:
    out = tmp_path / "o.gguf"
    assert plan_quantization(bf16, out, "q4_k_m").notes == ()
    (note,) = plan_quantization(bf16, out, "q2_k").notes
    assert "without importance" in note
    columns = importance_of(bf16)
    columns["blk.1.ffn_up_exps.weight"][2:5] = 0
    for layer in (0, 1):
        del columns[f"blk.{layer}.attn_q_a.weight"]
    weights = {
        name: InputSums(values, values.any(axis=1).astype(np.float32))
        for name, values in columns.items()
    }
    guide = tmp_path / "guide.gguf"
    write_importance(guide, Importance(weights, (), 0, 0))
    missing, unseen = plan_quantization(bf16, out, "q2_k", imatrix=guide).notes
    assert "blk.{0-1}.attn_q_a.weight" in missing
    assert unseen.startswith("blk.1.ffn_up_exps.weight: nothing met 3 of 16")


# ---- refusals ------------------------------------------------------------------------------------
def test_quantized_input_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "q8.gguf"
    quantize_file(model("tied"), source, "q8_0")
    out = tmp_path / "o.gguf"
    with pytest.raises(UsageError, match=r"quantized already.*--allow-requantize"):
        quantize_file(source, out, "q4_k_m")
    assert not out.exists()
    quantize_file(source, out, "q4_k_m", allow_requantize=True)
    assert read_gguf(out).tensors["blk.0.ffn_up.weight"].format == "Q4_K"


def test_refusals(bf16: Path, tmp_path: Path) -> None:
    out = tmp_path / "o.gguf"
    with pytest.raises(UsageError, match="type 'q9' is unknown"):
        plan_quantization(bf16, out, "q9")
    with pytest.raises(UsageError, match="useless without importance"):
        plan_quantization(bf16, out, "q2_k_s")
    with pytest.raises(UsageError, match="cannot replace the old one"):
        plan_quantization(bf16, bf16, "q8_0")
    with pytest.raises(ModelError, match="no such file"):
        plan_quantization(bf16, out, "q8_0", imatrix=tmp_path / "none")
    columns = importance_of(bf16)
    guide = write_columns(tmp_path / "g", {"other.weight": np.ones((1, 8), np.float32)})
    with pytest.raises(ModelError, match="knows none of the weights"):
        plan_quantization(bf16, out, "q8_0", imatrix=guide)
    columns["blk.0.ffn_up.weight"] = np.ones((1, 255), np.float32)
    guide = write_columns(tmp_path / "g", columns)
    with pytest.raises(ModelError, match=r"ffn_up.weight' has 255 numbers; accepted: 1 x"):
        plan_quantization(bf16, out, "q8_0", imatrix=guide)
    assert not out.exists()


@pytest.mark.parametrize("length", [0, 3, 4, 6, 40, 2000, -5])
def test_damaged_files_of_importance(bf16: Path, tmp_path: Path, length: int) -> None:
    guide = write_list(tmp_path / "guide.dat", importance_of(bf16))
    guide.write_bytes(guide.read_bytes()[:length])
    with pytest.raises((ModelError, FormatError)):
        plan_quantization(bf16, tmp_path / "o.gguf", "q4_k_m", imatrix=guide)


@pytest.mark.parametrize("value", [-1.0, np.nan])
def test_importance_that_is_none(bf16: Path, tmp_path: Path, value: float) -> None:
    columns = importance_of(bf16)
    columns["blk.0.ffn_up.weight"][0, 3] = value
    for guide in (write_list(tmp_path / "a", columns), write_columns(tmp_path / "b", columns)):
        with pytest.raises((ModelError, FormatError), match="negative or not finite"):
            plan_quantization(bf16, tmp_path / "o.gguf", "q4_k_m", imatrix=guide)


@pytest.mark.parametrize(
    ("type", "value", "message"),
    [
        ("q4_k_m", np.nan, r"'token_embd.weight': quantize: element 5 is nan"),
        ("q4_k_m", 1e30, "exceeds binary16"),
        ("f16", 1e6, "beyond what F16 holds"),
    ],
)
def test_numbers_that_do_not_fit(tmp_path: Path, type: str, value: float, message: str) -> None:
    source, out = tmp_path / "i.gguf", tmp_path / "o.gguf"
    numbers = np.ones((4, 256), np.float32)
    numbers[2, 5] = value
    tensor = NewTensor("token_embd.weight", "F32", (4, 256))
    metadata = {"general.architecture": "deepseek2"}
    write_gguf(source, metadata, [tensor], lambda _: [numbers.view(np.uint8).reshape(-1)])
    with pytest.raises(ModelError, match=message):
        quantize_file(source, out, type)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["i.gguf"]
