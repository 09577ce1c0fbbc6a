"""Whole models on a device, in part or as a whole: the CPU's logits, and sessions that move."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda.device import cuda_problem
from mla_backend import Model
from small_models import small_model

IDS = [5, 3, 8, 13, 2]


@pytest.fixture(params=["cuda"])
def device(request: pytest.FixtureRequest) -> str:
    if problem := cuda_problem():
        pytest.skip(problem)
    return str(request.param)


def load(device: str, n_layer: int = 3, **options: Any) -> Model:
    path = small_model("tiny-v3", "q8_0", n_layer=n_layer)
    chosen: dict[str, Any] = {"n_batch": 8, "precision": "exact"} | options
    return Model.load(path, device=device, n_ctx=128, **chosen)


@pytest.mark.parametrize(
    ("options", "on_device"),
    [
        ({}, 3),
        ({"gpu_layers": 2}, 2),
        ({"cpu_moe": True}, 3),
        ({"override_tensor": [("attn_output", "cpu"), ("blk.1.ffn", "cpu")]}, 3),
        ({"cache_type": "q8_0"}, 3),
    ],
    ids=["all", "two-layers", "cpu-moe", "overrides", "q8-cache"],
)
def test_logits_are_the_cpus(device: str, options: dict[str, Any], on_device: int) -> None:
    same = {key: value for key, value in options.items() if key == "cache_type"}
    with load("cpu", **same) as cpu, load(device, **options) as placed:
        want = cpu.logits(IDS)
        assert sum(name != "cpu" for name in placed.placement.layers) == on_device
        assert placed.memory.device_bytes > 0
        np.testing.assert_allclose(placed.logits(IDS), want, atol=5e-3)


@pytest.mark.parametrize("cache_type", ["f16", "bf16", "q8_0"])
def test_what_models_run_by_default(device: str, cache_type: str) -> None:
    """The fast kernels of attention, of one token and of many, on a cache as models have it.

    One layer, which has no experts: roundings make others choose other experts.
    """
    options: dict[str, Any] = {"precision": "fast", "cache_type": cache_type, "n_batch": 128}
    options["n_layer"] = 1
    for attention in ("absorbed", "expanded"):
        with (
            load("cpu", attention=attention, **options) as cpu,
            load(device, attention=attention, **options) as placed,
        ):
            ids = IDS * 12
            want, got = cpu.logits(ids), placed.logits(ids)
            assert np.abs(got - want).max() <= 0.05 * np.abs(want).max()
            for model in (cpu, placed):
                assert len(model.generate(ids, max_tokens=1, ignore_eos=True).tokens) == 1


def test_a_session_moves_from_device_to_cpu(device: str, tmp_path: Path) -> None:
    path = tmp_path / "session"
    with load(device) as there, load("cpu") as here:
        with there.session() as session:
            session.feed(IDS)
            session.save(path)
            want = session.feed([7])
        with here.session() as session:
            session.load(path)
            assert session.tokens == IDS
            np.testing.assert_allclose(session.feed([7]), want, atol=5e-3)


def test_a_token_runs_again_as_recorded(device: str) -> None:
    with load(device) as placed, load("cpu") as cpu:
        options: dict[str, Any] = {"max_tokens": 5, "temperature": 0.0, "ignore_eos": True}
        got = placed.generate(IDS, **options)
        assert got.tokens == cpu.generate(IDS, **options).tokens


@pytest.mark.parametrize("shape", ["tiny-v2", "tiny-v3"])
def test_single_tokens_in_few_kernels(device: str, shape: str) -> None:
    """Step after step of one token, each norm and rotation part of the kernel behind it."""
    path = small_model(shape, "q4_k_m", n_layer=3)
    found = []
    for name, precision in ((device, "fast"), ("cpu", "exact")):
        options: dict[str, Any] = {"n_ctx": 64, "n_batch": 8, "precision": precision}
        with Model.load(path, device=name, **options) as model, model.session() as session:
            session.feed(IDS)
            found.append([session.feed([token]) for token in (7, 1, 4)])
    got, want = (np.asarray(rows) for rows in found)
    assert np.abs(got - want).max() <= 0.02 * want.std()
