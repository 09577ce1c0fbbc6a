"""Costs of a model, limits of a machine, energy, and the script that writes models."""

from __future__ import annotations

import ctypes
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mla_backend import _core
from mla_backend.config import config_from_gguf
from mla_backend.cost import CostModel
from mla_backend.energy import EnergyMeter
from mla_backend.errors import UnsupportedError
from mla_backend.gguf import read_gguf
from mla_backend.limits import cpu_limits, gpu_limits
from mla_backend.nvml import Gpu
from mla_backend.peers import llama_cpp_python
from mla_backend.synth import SHAPES
from small_models import small_model

BENCH = Path(__file__).parents[1] / "bench"


def costs_of(path: Path, cache_type: str = "f16", isa: str = "") -> CostModel:
    file = read_gguf(path)
    return CostModel(file, config_from_gguf(file), cache_type, isa)


def test_one_token_reads_what_it_uses() -> None:
    path, shape = small_model("tiny-v2", "q4_k_m"), SHAPES["tiny-v2"]
    costs = costs_of(path)
    n_bytes = n_params = 0.0
    for tensor in read_gguf(path).tensors.values():
        share = shape.n_expert_used / shape.n_expert if "_exps." in tensor.name else 1.0
        if tensor.name != "token_embd.weight":
            n_bytes += share * tensor.n_bytes
            n_params += share * math.prod(tensor.shape)
    cell_bytes = shape.n_layer * 2 * (shape.kv_lora_rank + shape.rope)
    attention = shape.n_layer * shape.n_head * 2 * (2 * shape.kv_lora_rank + shape.rope)
    found = costs.run(1, 99)
    assert costs.n_active_params == pytest.approx(n_params)
    assert found.n_bytes == pytest.approx(n_bytes + 100 * cell_bytes)
    assert found.n_ops == pytest.approx(2 * n_params + 100 * attention)
    assert found.contractions == {"absorbed"}


def test_the_head_is_read_where_there_are_logits() -> None:
    path = small_model("tiny-v2", "q4_k_m")
    costs, head = costs_of(path), read_gguf(path).tensors["output.weight"]
    without = costs.run(8, 0, outputs=0)
    assert costs.run(8, 0).n_bytes - without.n_bytes == head.n_bytes
    halves = costs.prefill(16, 0, 8)  # the last pass alone has logits
    assert halves.n_bytes == without.n_bytes + costs.run(8, 8).n_bytes


@pytest.mark.parametrize("has_query_latent", [True, False])
def test_the_peer_is_given_the_key_that_it_demands(has_query_latent: bool) -> None:
    given: dict[str, Any] = {}
    request = {"model": "m", "n_ctx": 8, "n_batch": 8, "threads": 1, "on_gpu": False}
    request |= {"has_query_latent": has_query_latent}
    llama_cpp_python.load(SimpleNamespace(Llama=lambda **options: given.update(options)), request)
    override = {"deepseek2.attention.q_lora_rank": 0}
    assert given["kv_overrides"] == (None if has_query_latent else override)


def test_prefill_reads_weights_once_per_pass() -> None:
    costs = costs_of(small_model("tiny-v2", "q4_k_m"))
    whole, halves = costs.prefill(512, 0, 512), costs.prefill(512, 0, 256)
    assert halves.n_bytes == pytest.approx(2 * whole.n_bytes, rel=0.3)
    assert whole.n_ops > 400 * costs.run(1, 0, outputs=0).n_ops
    assert whole.seconds(1.0, 1e9) == pytest.approx(whole.n_bytes / 1e9)
    assert whole.seconds(1e9, 1.0) == pytest.approx(whole.n_ops / 1e12)


def test_modes_cost_what_they_do() -> None:
    costs = costs_of(small_model("tiny-v2", "q4_k_m"))
    absorbed, expanded = (costs.decode(4, 1000, mode) for mode in ("absorbed", "expanded"))
    assert absorbed.contractions == {"absorbed"}
    assert expanded.contractions == {"expanded"}
    assert expanded.n_ops > absorbed.n_ops
    assert expanded.n_bytes == absorbed.n_bytes
    mixed = costs.prefill(600, 0, 500)
    assert mixed.contractions == {"absorbed", "expanded"}


@pytest.mark.parametrize("isa", _core.available_isas())
def test_limits_of_every_isa(isa: str) -> None:
    found = cpu_limits(isa, 2, 4 << 20)
    assert found.read_gbps > 0
    assert found.f32_tops > 0
    assert found.int8_tops > 0
    assert (found.bf16_tops > 0) == (isa in ("avx512bf16", "avx512amx"))
    assert found.tops == max(found.f32_tops, found.int8_tops, found.bf16_tops)
    assert found.threads == 2
    assert found.name
    assert cpu_limits(isa, 2, 4 << 20) is found


def test_limits_refuse_too_little() -> None:
    backend = _core.CpuBackend(_core.ThreadPool(1))
    for n_bytes, n_repeats in ((0, 1), (1 << 20, 0)):
        with pytest.raises(UnsupportedError, match="measure_peak"):
            backend.measure_peak(n_bytes, n_repeats)


def package(root: Path, name: str, microjoules: int) -> Path:
    domain = root / name
    domain.mkdir(parents=True)
    (domain / "name").write_text("package-0\n")
    (domain / "max_energy_range_uj").write_text("1000000\n")
    (domain / "energy_uj").write_text(f"{microjoules}\n")
    return domain / "energy_uj"


def test_energy_of_packages(tmp_path: Path) -> None:
    counter = package(tmp_path, "intel-rapl:0", 900_000)
    package(tmp_path, "intel-rapl:0:0", 5)  # a part of it
    meter = EnergyMeter(root=tmp_path)
    assert meter.sources == ["RAPL package-0"]
    assert meter.problem == ""
    first = meter.read_j()
    counter.write_text("950000")
    second = meter.read_j()
    counter.write_text("150000")  # it began anew
    third = meter.read_j()
    assert first is not None
    assert second is not None
    assert third is not None
    assert second - first == pytest.approx(0.05)
    assert third - second == pytest.approx(0.2)


def test_energy_is_left_out_and_said(tmp_path: Path) -> None:
    meter = EnergyMeter(root=tmp_path)
    assert meter.read_j() is None
    assert meter.sources == []
    assert str(tmp_path) in meter.problem


class FakeNvml:
    """The management library with one GPU; its functions return 0 for success."""

    def nvmlDeviceGetName(self, handle: Any, text: Any, size: int) -> int:  # noqa: N802
        text.value = b"NVIDIA H200"
        return 0

    def nvmlDeviceGetMaxClockInfo(self, handle: Any, kind: int, out: Any) -> int:  # noqa: N802
        out._obj.value = 3201
        return 0

    def nvmlDeviceGetMemoryBusWidth(self, handle: Any, out: Any) -> int:  # noqa: N802
        out._obj.value = 6144
        return 0

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: Any, out: Any) -> int:  # noqa: N802
        out._obj.value = 12_500
        return 0


def test_what_the_driver_tells_of_a_gpu(tmp_path: Path) -> None:
    gpu = Gpu(FakeNvml(), ctypes.c_void_p(1))
    assert gpu.name == "NVIDIA H200"
    assert gpu.memory_gbps == pytest.approx(4916.7, rel=1e-3)
    meter = EnergyMeter([gpu], root=tmp_path)
    assert meter.sources == ["NVML NVIDIA H200"]
    assert meter.read_j() == pytest.approx(12.5)
    limits = gpu_limits("cuda:0", gpu)
    assert limits.tops == 0
    assert not limits.is_measured


def test_script_writes_models(tmp_path: Path) -> None:
    def make(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(BENCH / "make_model.py"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    target = tmp_path / "m.gguf"
    options = ("--shape", "tiny-v3", "--layers", "2", "--experts", "8", "--layout", "legacy")
    done = make(str(target), *options)
    assert done.returncode == 0, done.stderr
    metadata = read_gguf(target).metadata
    assert metadata["deepseek2.block_count"] == 2
    assert metadata["deepseek2.expert_count"] == 8
    refused = make(str(tmp_path / "absent" / "m.gguf"))
    assert refused.returncode == 1
    assert "Traceback" not in refused.stderr
