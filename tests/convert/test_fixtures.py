"""Converted reference checkpoints beside the files and values of independent programs."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from convert.files import keys, raw
from mla_backend import Model
from mla_backend.convert.from_hf import ConvertOptions, convert
from mla_backend.convert.upgrade import upgrade
from mla_backend.gguf import read_gguf

NAMES = {"tiny-v2": "Tiny V2", "tiny-v3": "Tiny V3"}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("converted")
    yield path
    shutil.rmtree(path)


@pytest.mark.parametrize(
    ("model", "source"), [("tiny-v2", "hf"), ("tiny-v3", "hf"), ("tiny-v3", "hf-fp8")]
)
def test_equal_to_the_reference_file(
    fixtures_dir: Path, directory: Path, model: str, source: str
) -> None:
    ours = directory / f"{model}-{source}.gguf"
    theirs = fixtures_dir / model / "gguf" / f"{model}-BF16.gguf"
    options = ConvertOptions(outtype="bf16", keep_nextn=False, name=NAMES[model])
    convert(fixtures_dir / model / source, ours, options)
    assert raw(ours) == raw(theirs)
    assert keys(ours) == keys(theirs)


def test_prediction_layer_is_all_that_differs(fixtures_dir: Path, directory: Path) -> None:
    ours = directory / "mtp.gguf"
    convert(fixtures_dir / "tiny-v3" / "hf-fp8", ours, ConvertOptions(name="Tiny V3"))
    theirs = fixtures_dir / "tiny-v3" / "gguf" / "tiny-v3-BF16.gguf"
    found, reference = raw(ours), raw(theirs)
    assert {name: found[name] for name in reference} == reference
    assert {name.split(".")[1] for name in found.keys() - reference.keys()} == {"3"}
    before, after = keys(theirs), keys(ours)
    changed = {key: value for key, (_, value) in after.items() if before.get(key) != after[key]}
    assert changed == {
        "deepseek2.block_count": 4,
        "deepseek2.nextn_predict_layers": 1,
        "general.size_label": "16x3.5M",
    }


@pytest.mark.parametrize(
    ("model", "source", "outtype", "layout", "values"),
    [
        ("tiny-v2", "hf", "bf16", "split", "BF16"),
        ("tiny-v2", "hf", "bf16", "legacy", "BF16"),
        ("tiny-v3", "hf", "bf16", "split", "BF16"),
        ("tiny-v3", "hf-fp8", "bf16", "split", "BF16"),
        ("tiny-v3", "hf-fp8", "f32", "split", "hf-fp8"),
        ("tiny-v3", "hf-fp8", "f32", "legacy", "hf-fp8"),
    ],
)
def test_logits(
    fixtures_dir: Path,
    directory: Path,
    model: str,
    source: str,
    outtype: str,
    layout: str,
    values: str,
) -> None:
    path = directory / f"{model}-{source}-{outtype}-{layout}.gguf"
    options = ConvertOptions(outtype=outtype, layout=layout)  # type: ignore[arg-type]
    convert(fixtures_dir / model / source, path, options)
    check_logits(path, fixtures_dir / model / "expected" / f"{values}.npz")


def check_logits(path: Path, values: Path) -> None:
    expected = np.load(values)
    with Model.load(path, n_ctx=640, precision="exact", cache_type="f32") as model:
        for prompt in ("short", "long"):
            logits = model.logits(expected[f"{prompt}_ids"].tolist())[-1]
            assert np.abs(logits - expected[f"{prompt}_last_logits"]).max() < 1e-3


@pytest.mark.parametrize("layout", ["split", "legacy"])
def test_the_other_program_reads_it(fixtures_dir: Path, directory: Path, layout: str) -> None:
    other = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    path = directory / f"other-{layout}.gguf"
    options = ConvertOptions(outtype="f32", layout=layout)  # type: ignore[arg-type]
    convert(fixtures_dir / "tiny-v3" / "hf-fp8", path, options)
    expected = np.load(fixtures_dir / "tiny-v3" / "expected" / "hf-fp8.npz")
    ids = expected["short_ids"].tolist()
    model = other.Llama(str(path), n_ctx=64, logits_all=True, type_k=0, type_v=0, verbose=False)
    model.eval(ids)
    assert np.abs(model.scores[len(ids) - 1] - expected["short_last_logits"]).max() < 1e-3


def test_upgraded_legacy_file(fixtures_dir: Path, directory: Path) -> None:
    old = fixtures_dir / "tiny-v2" / "gguf" / "tiny-v2-legacy-Q4_K_M.gguf"
    new = directory / "upgraded.gguf"
    plan = upgrade(old, new, k_b_format="F32")
    assert {(change.before, change.after) for change in plan.requantized} == {
        ("Q4_K", "F32"),
        ("Q6_K", "F32"),
    }
    check_logits(new, fixtures_dir / "tiny-v2" / "expected" / "legacy-Q4_K_M.npz")


@pytest.mark.parametrize("type", ["Q4_K_M", "Q8_0", "IQ4_XS", "Q2_K"])
def test_formats_of_mixes(fixtures_dir: Path, directory: Path, type: str) -> None:
    path = directory / f"{type}.gguf"
    convert(fixtures_dir / "tiny-v2" / "hf", path, ConvertOptions(outtype=type, name="Tiny V2"))
    theirs = fixtures_dir / "tiny-v2" / "gguf" / f"tiny-v2-{type}.gguf"
    formats = [
        {name: (info.format, info.shape) for name, info in read_gguf(file).tensors.items()}
        for file in (path, theirs)
    ]
    assert formats[0] == formats[1]
    assert keys(path) == keys(theirs)
