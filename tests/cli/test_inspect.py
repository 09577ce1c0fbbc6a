"""``inspect`` and ``synth``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from cli.conftest import Cli
from mla_backend import Model
from mla_backend.cache import CACHE_TYPES, bytes_per_position
from mla_backend.inspection import inspect_model


@pytest.mark.parametrize("precision", ["fast", "exact"])
@pytest.mark.parametrize("layout", ["tiny", "tiny_legacy"])
def test_plan_is_what_loading_takes(
    request: pytest.FixtureRequest, layout: str, precision: str
) -> None:
    path = request.getfixturevalue(layout)
    report = inspect_model(path, n_ctx=300, cache_type="bf16", precision=precision, n_batch=64)
    with Model.load(path, n_ctx=300, cache_type="bf16", precision=precision, n_batch=64) as model:
        assert report.memory.cache_bytes == model.memory.cache_bytes
        assert report.memory.workspace_bytes == model.memory.workspace_bytes
        assert report.memory.weights_mapped_bytes == model.memory.weights_mapped_bytes
        assert report.memory.weights_copied_bytes == model.memory.weights_copied_bytes
        assert report.memory.anonymous_bytes == model.memory.anonymous_bytes
    assert report.memory.fits
    assert report.memory.n_ctx == 300


def test_counts(tiny: Path) -> None:
    report = inspect_model(tiny)
    config = report.config
    assert report.n_params_active < report.n_params
    assert sum(row.n_bytes for row in report.formats) < tiny.stat().st_size
    assert [cost.cache_type for cost in report.caches] == list(CACHE_TYPES)
    for cost in report.caches:
        assert cost.bytes_per_position == bytes_per_position(config, cost.cache_type)
    assert report.memory.n_ctx == config.n_ctx_train
    assert report.tokenizer is not None
    assert report.tokenizer.is_known


def test_no_mmap_counts_as_copy(tiny: Path) -> None:
    memory = inspect_model(tiny, mmap=False).memory
    assert memory.weights_mapped_bytes == 0
    assert memory.weights_copied_bytes >= tiny.stat().st_size


def test_what_does_not_fit(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mla_backend._core.available_memory_bytes", lambda root="": 1 << 20)
    memory = inspect_model(tiny, n_ctx=100_000).memory
    assert not memory.fits
    assert not memory.weights_stay
    assert memory.warning is not None


def test_text(cli: Cli, tiny: Path, tiny_legacy: Path) -> None:
    result = cli("inspect", tiny, "-c", "256")
    assert result.status == 0
    assert result.err == ""
    for text in ("deepseek2", "split (new)", "Q8_0", "bytes per position", "it fits", "for 256"):
        assert text in result.out
    legacy = cli("inspect", "-m", tiny_legacy).out
    assert "legacy (old)" in legacy
    assert "mla-backend upgrade" in legacy


def test_json(cli: Cli, tiny: Path) -> None:
    found = json.loads(cli("inspect", tiny, "--json", "-ctk", "q8_0").out)
    assert found["architecture"] == "deepseek2"
    assert found["config"]["layout"] == "split"
    assert found["memory"]["cache_type"] == "q8_0"
    assert found["memory"]["fits"] is True


def test_shards(cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "parts.gguf"
    made = json.loads(cli("synth", "tiny-v2", out, "--shards", "3", "--json").out)
    assert len(made["paths"]) == 3
    text = cli("inspect", made["paths"][1]).out
    assert all(path in text for path in made["paths"])
    assert "together" in text
    Path(made["paths"][0]).unlink()
    result = cli("inspect", made["paths"][1])
    assert result.status == 1
    assert "missing" in result.err


def test_synth(cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "made.gguf"
    result = cli("synth", "tiny-v2", out, "--layers", "2", "--type", "q8_0", "--layout", "legacy")
    assert (result.status, result.out) == (0, f"{out}\n")
    report = inspect_model(out)
    assert (report.config.n_layer, report.config.layout) == (2, "legacy")
    again = cli("synth", "tiny-v2", out)
    assert again.status == 2
    assert "--force" in again.err
    assert cli("synth", "--shape", "tiny-v2", out, "--force").status == 0


def test_synth_cannot_write(cli: Cli, tmp_path: Path) -> None:
    result = cli("synth", "tiny-v2", tmp_path / "none" / "x.gguf")
    assert result.status in (1, 2)
    assert "none" in result.err
    assert "Traceback" not in result.err


def test_damaged_file(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    shutil.copy(tiny, path)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)
    result = cli("inspect", path)
    assert result.status == 1
    assert str(path) in result.err
