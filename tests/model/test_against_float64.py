"""Random models of many shapes against a float64 implementation of the whole."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from mla_backend import Model
from reference.model import ReferenceModel
from small_models import small_model

N_TOKENS = 40
YARN_TOKENS = 300  # beyond the 256 that the tiny models are trained on before YARN

#: name -> (shape, changes)
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "v2": ("tiny-v2", {"n_layer": 2}),
    "v2 with groups": (
        "tiny-v2",
        {
            "n_layer": 2,
            "n_expert": 12,
            "n_group": 4,
            "n_group_used": 2,
            "q_lora_rank": 64,
            "weights_scale": 4.0,
        },
    ),
    "v3": ("tiny-v3", {"n_layer": 2}),
    "v3 without groups": ("tiny-v3", {"n_layer": 2, "n_group": 1, "n_group_used": 1, "yarn": None}),
    "dense and tied": ("tiny-dense", {"n_layer": 2, "n_layer_dense": 2}),
    "experts everywhere, none shared": (
        "tiny-v2",
        {"n_layer": 2, "n_layer_dense": 0, "n_expert_shared": 0, "tied": True},
    ),
    "narrow heads": (
        "tiny-v3",
        {"n_layer": 2, "n_head": 3, "nope": 48, "rope": 32, "value": 80, "kv_lora_rank": 96},
    ),
    "wide heads": (
        "tiny-v2",
        {"n_layer": 2, "n_head": 2, "nope": 192, "rope": 64, "value": 256, "kv_lora_rank": 128},
    ),
    "odd widths": ("tiny-v2", {"n_layer": 2, "d_model": 144, "d_ff": 88, "d_ff_expert": 40}),
}


def random_ids(n: int, seed: int = 1) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).integers(0, 1016, n)]


@cache
def wanted(path: Path, n_tokens: int) -> npt.NDArray[np.float64]:
    return ReferenceModel(path).logits(random_ids(n_tokens))


def load(path: Path, **options: Any) -> Model:
    return Model.load(
        path, **({"n_ctx": 320, "threads": 2, "precision": "exact", "cache_type": "f32"} | options)
    )


@pytest.mark.parametrize("attention", ["absorbed", "expanded", "auto"])
@pytest.mark.parametrize("name", SHAPES)
def test_every_shape(name: str, attention: Any) -> None:
    shape, changes = SHAPES[name]
    path = small_model(shape, "f32", **changes)
    with load(path, attention=attention) as model:
        got = model.logits(random_ids(N_TOKENS))
    assert got.dtype == np.float32
    assert np.abs(got - wanted(path, N_TOKENS)).max() < 1e-4


@pytest.mark.parametrize("attention", ["absorbed", "expanded"])
@pytest.mark.parametrize("layout", ["split", "legacy"])
@pytest.mark.parametrize("type", ["f16", "bf16", "q8_0", "q4_k_m", "q2_k", "iq4_xs"])
def test_every_layout_and_type(type: str, layout: str, attention: Any) -> None:
    path = small_model("tiny-v2", type, layout, n_layer=2)
    want = wanted(path, N_TOKENS)
    with load(path, attention=attention) as model:
        assert np.abs(model.logits(random_ids(N_TOKENS)) - want).max() < 1e-4
    with load(path, attention=attention, precision="fast", cache_type="f16") as model:
        difference = np.abs(model.logits(random_ids(N_TOKENS)) - want).max(axis=1)
    # Logits have a deviation of 2.5; single tokens may meet other experts.
    assert np.median(difference) < 0.5


@pytest.mark.parametrize("attention", ["absorbed", "expanded"])
@pytest.mark.parametrize("shape", ["tiny-v2", "tiny-v3"])
def test_beyond_the_original_context(shape: str, attention: Any) -> None:
    path = small_model(shape, "f32", n_layer=2)
    with load(path, attention=attention) as model:
        got = model.logits(random_ids(YARN_TOKENS))
    assert np.abs(got - wanted(path, YARN_TOKENS)).max() < 1e-4


def test_shards_give_the_same(tmp_path: Path) -> None:
    ids = random_ids(N_TOKENS)
    one, three = (small_model("tiny-v2", "f32", n_layer=2, shards=n) for n in (1, 3))
    with load(one) as model, load(three) as split:
        np.testing.assert_array_equal(model.logits(ids), split.logits(ids))


@pytest.mark.parametrize("mmap", [True, False])
def test_read_weights_give_the_same(mmap: bool) -> None:
    path = small_model("tiny-v2", "q4_k_m", n_layer=2)
    with load(path, mmap=mmap) as model:
        got = model.logits(random_ids(N_TOKENS))
        memory = model.memory
    assert np.abs(got - wanted(path, N_TOKENS)).max() < 1e-4
    copied, mapped = memory.weights_copied_bytes, memory.weights_mapped_bytes
    size = path.stat().st_size
    assert (copied, mapped) == ((0, size) if mmap else (size, 0))
