"""Models and graphs spread over two devices: what one computes, in whatever order work is done.

An emulated pair does its work late where the test asks for it: when somebody waits for it, and no
sooner. What is not waited for as it must be is then not there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda.device import cuda_module, cuda_problem, is_emulated
from mla_backend import Model, _core
from mla_backend.devices import open_cuda
from mla_backend.errors import DeviceError, MemoryLimitError
from small_models import small_model

IDS = [5, 3, 8, 13, 2, 40, 41, 42, 43, 44]
RNG = np.random.default_rng(3)


@pytest.fixture(params=["at-once", "late"])
def pair(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Two devices; those of the machine do their work when they like."""
    if problem := cuda_problem():
        pytest.skip(problem)
    if is_emulated():
        monkeypatch.setenv("MLA_EMULATOR_DEVICES", "2")
        monkeypatch.setenv("MLA_EMULATOR_LATE", str(int(request.param == "late")))
    elif cuda_module().device_count() < 2:
        pytest.skip("one CUDA device")
    return str(request.param)


def load(device: str = "cuda", **options: Any) -> Model:
    path = small_model("tiny-v3", "q8_0", n_layer=3)
    chosen: dict[str, Any] = {"n_ctx": 128, "n_batch": 4, "precision": "exact"} | options
    return Model.load(path, device=device, **chosen)


def hops(model: Model) -> int:
    """Copies of a decoded token that neither begin nor end on the host."""
    executor = next(iter(model._runner._executors.values()))
    return int(executor.report()["n_direct_copies"])


def test_logits_are_those_of_one(pair: str) -> None:
    with load("cuda:0") as one, load(tensor_split=(1, 1)) as two:
        assert set(two.placement.layers) == {"cuda:0", "cuda:1"}
        assert (hops(one), hops(two)) == (0, 1)
        np.testing.assert_array_equal(two.logits(IDS), one.logits(IDS))


def test_chunks_of_a_prompt_overlap(pair: str) -> None:
    """Those before the last are begun and not waited for."""
    with (
        load("cuda:0") as one,
        load(tensor_split=(1, 2)) as two,
        one.session() as here,
        two.session() as there,
    ):
        for ids in (IDS, [7], [8]):
            np.testing.assert_array_equal(there.feed(ids), here.feed(ids))


def test_the_second_device_is_not_waited_for(pair: str, tmp_path: Path) -> None:
    """While it has a chunk, the first one gets the next, and nobody looks at the results."""
    if pair != "late":
        pytest.skip("when work is done is known of emulated devices that do it late")
    trace = tmp_path / "trace"

    def n_launched() -> int:
        return len(trace.read_text().splitlines()) if trace.exists() else 0

    with load(tensor_split=(1, 2)) as model, model.session() as session:
        session.feed(IDS[:8], outputs=0)  # plans are made, for which everybody waits
        session.feed(IDS[:1])
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MLA_CUDA_TRACE", str(trace))
            counts = []
            for _ in range(3):
                session.feed(IDS[:4], outputs=0)
                counts.append(n_launched())
            session.feed(IDS[:1])
        assert counts[:2] == [0, 0]
        assert 0 < counts[2] <= 1 / 3 * n_launched()


def test_tokens_run_again_as_recorded(pair: str) -> None:
    options: dict[str, Any] = {"max_tokens": 6, "temperature": 0.0, "ignore_eos": True}
    with load("cpu") as cpu, load(tensor_split=(2, 1)) as two:
        assert two.generate(IDS, **options).tokens == cpu.generate(IDS, **options).tokens


def test_the_host_takes_part(pair: str) -> None:
    """Experts stay on the host, so that every layer goes there and back."""
    with load("cpu") as cpu, load(tensor_split=(1, 1), cpu_moe=True) as two:
        np.testing.assert_allclose(two.logits(IDS), cpu.logits(IDS), atol=5e-3)


def test_sessions_move_between_one_two_and_none(pair: str, tmp_path: Path) -> None:
    path = tmp_path / "session"
    with load(tensor_split=(1, 1)) as two, load("cuda:1") as one, load("cpu") as cpu:
        with two.session() as session:
            session.feed(IDS)
            session.drop(3, 6)
            session.shift(4)
            session.save(path)
            want = session.feed([7])
        for model in (one, cpu, two):
            with model.session() as session:
                session.load(path)
                np.testing.assert_allclose(session.feed([7]), want, atol=5e-3)


def test_a_model_closed_while_devices_work(pair: str) -> None:
    with load(tensor_split=(1, 1)) as model, model.session() as session:
        session.feed(IDS[:8], outputs=0)
    with load(tensor_split=(1, 1)) as model:
        assert model.logits(IDS).shape[0] == len(IDS)


def test_one_out_of_memory(pair: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not is_emulated():
        pytest.skip("the devices' memory is what it is")
    monkeypatch.setenv("MLA_EMULATOR_MIB", "16")
    with load(tensor_split=(1, 1), gpu_layers=9) as model:
        want = model.logits(IDS)
        with pytest.raises(MemoryLimitError, match=r"cuda:\d is out of memory: \d+ bytes asked"):
            load(tensor_split=(1, 1), gpu_layers=9, n_ctx=60000)
        np.testing.assert_array_equal(model.logits(IDS), want)


def test_values_go_back_and_forth(pair: str) -> None:
    """Places in a memory are used again only when whoever copies from them is done."""
    backends = [open_cuda(0), open_cuda(1), _core.CpuBackend(_core.ThreadPool(1))]
    g = _core.Graph()
    x = g.input("x", "F32", [4, 256])
    y = x
    want = given = RNG.standard_normal((4, 256), dtype=np.float32)
    for step in range(12):
        g.place_on(("cuda:0", "cuda:1", "cuda:0", "cpu", "cuda:1")[step % 5])
        y = g.add(y, x) if step % 3 else g.add(y, y)
        want = want + given if step % 3 else want + want
    g.output(y)
    executor = _core.Executor(g, _core.Workspace(backends))
    for scale in (1, 2, -3):
        executor.run({"x": scale * given}, wait=scale == 2)
        if scale != 2:
            with pytest.raises(DeviceError, match="its values are not there"):
                executor.output(0)
            continue
        np.testing.assert_allclose(executor.output(0), scale * want, rtol=1e-5)
    executor.run({"x": given})
    np.testing.assert_allclose(executor.output(0), want, rtol=1e-5)
