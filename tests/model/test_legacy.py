"""Files of the layout of 2024 give what the same weights give in the split layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mla_backend import Model
from model.legacy import write_legacy
from small_models import small_model

N_TOKENS = 70


def compare(split: Path, legacy: Path, attention: Any, limit: float) -> None:
    ids = [int(i) for i in np.random.default_rng(2).integers(0, 1016, N_TOKENS)]
    options: dict[str, Any] = {
        "n_ctx": 128,
        "threads": 2,
        "precision": "exact",
        "cache_type": "f32",
        "attention": attention,
    }
    with Model.load(split, **options) as one, Model.load(legacy, **options) as other:
        assert one.config.layout == "split"
        assert other.config.layout == "legacy"
        assert any("legacy" in note and "mla-backend" in note for note in other.notes)
        assert not any("legacy" in note for note in one.notes)
        assert np.abs(one.logits(ids) - other.logits(ids)).max() < limit


@pytest.mark.parametrize("attention", ["absorbed", "expanded"])
@pytest.mark.parametrize("shape", ["tiny-v2", "tiny-v3"])
@pytest.mark.parametrize("type", ["f32", "f16", "bf16"])
def test_rewritten_random_model(tmp_path: Path, type: str, shape: str, attention: Any) -> None:
    split = small_model(shape, type, n_layer=2)
    write_legacy(split, tmp_path / "legacy.gguf")
    compare(split, tmp_path / "legacy.gguf", attention, 1e-4)


@pytest.mark.parametrize("attention", ["absorbed", "expanded"])
def test_random_model_written_in_both_layouts(attention: Any) -> None:
    split, legacy = (small_model("tiny-v2", "f32", layout, n_layer=2) for layout in LAYOUTS)
    compare(split, legacy, attention, 1e-4)


LAYOUTS = ("split", "legacy")


@pytest.mark.parametrize("attention", ["absorbed", "expanded"])
@pytest.mark.parametrize("model", ["tiny-v2", "tiny-v3"])
def test_rewritten_reference_file(
    fixtures_dir: Path, tmp_path: Path, model: str, attention: Any
) -> None:
    split = fixtures_dir / model / "gguf" / f"{model}-BF16.gguf"
    write_legacy(split, tmp_path / "legacy.gguf")
    compare(split, tmp_path / "legacy.gguf", attention, 1e-4)
