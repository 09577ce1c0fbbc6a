"""``doctor``: every state that a machine, its driver and this install can be in."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from cli.conftest import Cli
from machines import Node, make_machine, sockets
from mla_backend import _core, devices, diagnosis
from mla_backend.errors import DeviceError
from small_models import small_model

Gpu = tuple[str, tuple[int, int]]  # name, capability
H200: Gpu = ("NVIDIA H200", (9, 0))
SMI_H200 = "NVIDIA H200, 9.0, 143771, 580.159.03\n"


@dataclass
class FakeModule:
    """The module of CUDA devices, as it would be on another machine."""

    gpus: list[Gpu] = field(default_factory=lambda: [H200])
    problem: str = ""
    driver: int = 13000
    archs: list[str] = field(default_factory=lambda: ["90a-real"])
    lost: bool = False

    def device_count(self) -> int:
        return 0 if self.problem else len(self.gpus)

    def device_problem(self) -> str:
        return self.problem

    def driver_version(self) -> int:
        return self.driver

    def runtime_version(self) -> int:
        return 13000

    def compiled_archs(self) -> list[str]:
        return self.archs

    def device_info(self, index: int) -> dict[str, Any]:
        if self.lost:
            raise DeviceError("CUDA: choosing the device: unspecified launch failure")
        name, capability = self.gpus[index]
        memory = {"total_bytes": 140 << 30, "free_bytes": 100 << 30}
        return {"name": name, "capability": capability, "n_sm": 132, "l2_bytes": 0, **memory}

    def CudaBackend(self, number: int, record: bool) -> Any:  # noqa: N802
        return ("cuda", number, record)


@dataclass
class Machine:
    """Sets what ``doctor`` finds, and runs it."""

    cli: Cli
    monkeypatch: pytest.MonkeyPatch

    def text(self, module: FakeModule | None, smi: str) -> str:
        self.monkeypatch.setattr(devices, "cuda_module", lambda: module)
        self.monkeypatch.setattr(diagnosis, "_ask_smi", lambda: smi)
        result = self.cli("doctor")
        assert (result.status, result.err) == (0, "")
        return result.out


@pytest.fixture
def machine(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(cli, monkeypatch)


def test_this_machine(cli: Cli) -> None:
    result = cli("doctor")
    assert (result.status, result.err) == (0, "")
    for word in ("cpu:", "isa:", "memory:", "driver:", "gpus:", "cuda:", "devices: cpu"):
        assert word in result.out
    found = json.loads(cli("doctor", "--json").out)
    assert found["cpu"]["isa"] in _core.available_isas()
    assert 1 <= found["cpu"]["n_cores_usable"] <= found["cpu"]["n_threads_usable"]
    assert found["memory_available_bytes"] > 0
    assert found["devices"][0]["name"] == "cpu"
    assert found["devices"][0]["problem"] == ""


def test_isa_that_is_not_here(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLA_CPU_ISA", "sse9")
    out = cli("doctor").out
    assert "isa:     none: " in out
    assert "not usable: " in out


def test_gpu_in_use(machine: Machine) -> None:
    out = machine.text(FakeModule(), SMI_H200)
    assert "driver:  NVIDIA 580.159.03, serves CUDA 13.0\n" in out
    assert "gpus:    NVIDIA H200, capability 9.0, 140 GiB\n" in out
    assert "cuda:    built with runtime 13.0 for 90a-real\n" in out
    assert "cuda:0  usable (NVIDIA H200, capability 9.0, 140.0 GiB, 100.0 GiB free)" in out


def test_no_gpu_and_no_module(machine: Machine) -> None:
    out = machine.text(None, "")
    assert "no NVIDIA driver" in out
    assert "none seen" in out
    assert "built without CUDA" in out
    assert "MLA_CUDA=on" not in out


def test_gpu_without_the_module(machine: Machine) -> None:
    out = machine.text(None, SMI_H200 * 2)
    assert out.count("NVIDIA H200") == 2
    assert "this install was built without CUDA" in out
    assert "MLA_CUDA=on pip install" in out


def test_module_that_does_not_load(machine: Machine, cli: Cli) -> None:
    def broken() -> None:
        raise ImportError("undefined symbol: x")

    machine.text(None, SMI_H200)
    machine.monkeypatch.setattr(devices, "cuda_module", broken)
    out = cli("doctor").out
    assert "the module does not load: undefined symbol: x" in out
    assert "MLA_CUDA=on pip install" in out


def test_no_driver(machine: Machine) -> None:
    module = FakeModule(problem="no NVIDIA driver is installed", driver=0)
    out = machine.text(module, "")
    assert "no device can be used: no NVIDIA driver is installed" in out
    assert "a driver of version 580 or later serves CUDA 13" in out
    assert "cuda:0" not in out


def test_driver_without_its_library(machine: Machine) -> None:
    out = machine.text(FakeModule(problem="no NVIDIA driver is installed", driver=0), SMI_H200)
    assert "the kernel has driver 580.159.03, but libcuda.so was not found" in out


def test_old_driver(machine: Machine) -> None:
    problem = "the NVIDIA driver serves CUDA 12.4, and this build needs 13.0: update the driver"
    module = FakeModule(problem=problem, driver=12040)
    out = machine.text(module, "NVIDIA A100, 8.0, 81920, 550.54.15\n")
    assert "driver:  NVIDIA 550.54.15, serves CUDA 12.4\n" in out
    assert problem in out
    assert "a driver of version 580 or later" in out


def test_hidden_gpus(machine: Machine) -> None:
    machine.monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    out = machine.text(FakeModule(problem="no CUDA-capable device is detected"), SMI_H200)
    assert "CUDA_VISIBLE_DEVICES is '-1', which hides them" in out


def test_old_gpu(machine: Machine) -> None:
    module = FakeModule(gpus=[("Tesla V100", (7, 0)), H200], archs=["75-virtual"])
    out = machine.text(module, "")
    assert (
        "cuda:0  not usable: Tesla V100 has compute capability 7.0, accepted is 7.5 or later" in out
    )
    assert "cuda:1  usable" in out


def test_gpu_without_code_for_it(machine: Machine) -> None:
    module = FakeModule(gpus=[("NVIDIA L4", (8, 9))])
    out = machine.text(module, "")
    assert "this build has code for 90a-real: install it again with MLA_CUDA_ARCHS=89-real" in out


def test_lost_gpu(machine: Machine) -> None:
    out = machine.text(FakeModule(lost=True), SMI_H200)
    assert "cuda:0  not usable: CUDA: choosing the device" in out


# ---- what the system shows -----------------------------------------------------------------------


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_kernel_files_where_the_tool_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    driver = tmp_path / "proc/driver/nvidia"
    line = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 2023\n"
    write(driver / "version", line)
    write(driver / "gpus/0000:01:00.0/information", "Model: \t\t NVIDIA A10\nIRQ:   42\n")
    write(tmp_path / "proc/cpuinfo", "processor : 0\nmodel name\t: Some CPU\n")
    node = tmp_path / "sys/devices/system/node"
    for i in (0, 1, 10):
        write(node / f"node{i}/cpulist", f"{i}-{i + 3}\n")
        write(node / f"node{i}/meminfo", f"Node {i} MemTotal:   1024 kB\n")
    found = diagnosis.diagnose(tmp_path)
    assert found.driver == "535.104.05"
    assert [gpu.name for gpu in found.gpus] == ["NVIDIA A10"]
    assert found.cpu.model == "Some CPU"
    assert [(n.number, n.cpus, n.memory_bytes) for n in found.numa.nodes] == [
        (0, "0-3", 1 << 20),
        (1, "1-4", 1 << 20),
        (10, "10-13", 1 << 20),
    ]


def test_numa_nodes(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [
        *(replace(node, distance=[*node.distance, 14]) for node in sockets(2, 2, 4, lambda *_: 12)),
        Node(4, total_kb=8 << 20, free_kb=4 << 20, distance=[14, 14, 14, 14, 10]),
    ]
    make_machine(tmp_path, nodes, allowed_cpus="0-7,16-23", allowed_nodes="0,2-4")
    write(tmp_path / "proc/sys/kernel/numa_balancing", "1\n")
    write(tmp_path / "sys/kernel/mm/transparent_hugepage/enabled", "always madvise [never]\n")
    found = diagnosis.diagnose(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(diagnosis, "diagnose", lambda: found)
        out = cli("doctor").out
    assert (
        "numa:    node 0: CPUs 0-3,16-19, 64.0 GiB, 60.0 GiB free, distances 10 12 32 32 14\n"
        in out
    )
    assert "node 1: CPUs 4-7,20-23, 64.0 GiB, not for this process" in out
    assert "node 2: CPUs 8-11,24-27 (none usable), 64.0 GiB, 60.0 GiB free" in out
    assert "node 4: CPUs none, 8.0 GiB, 4.0 GiB free" in out
    assert "memory policy of this process: default" in out
    assert "group of node 0: 8 cores, 60.0 GiB free, and the memory of nodes 2-4" in out
    assert "--numa auto is off here" in out
    assert "sysctl" not in out  # one node has nothing to balance
    both = make_machine(tmp_path / "both", sockets(2, 1, 4, lambda *_: 10))
    write(tmp_path / "both/proc/sys/kernel/numa_balancing", "1\n")
    write(tmp_path / "both/sys/kernel/mm/transparent_hugepage/enabled", "always madvise [never]\n")
    advice = diagnosis.diagnose(Path(both)).numa.advice
    assert [text.rpartition("on: ")[2] for text in advice[1:]] == [
        "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled"
    ]
    assert "sysctl kernel.numa_balancing=0" in advice[0]


@pytest.mark.parametrize(
    ("script", "n_gpus"),
    [
        ("echo 'NVIDIA H200, 9.0, 143771, 580.1'", 1),
        ("echo 'Old GPU, [N/A], [N/A], 450.1'", 1),
        ("echo 'Failed to initialize NVML'; exit 9", 0),
        ("echo 'not a table'", 0),
    ],
)
def test_answers_of_the_tool(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, n_gpus: int
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert len(diagnosis.diagnose(tmp_path).gpus) == n_gpus


# ---- which code runs where -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "runs", "does_not"),
    [
        ("80-real", [(8, 0), (8, 6), (8, 9)], [(7, 5), (9, 0), (12, 0)]),
        ("86-real", [(8, 6), (8, 9)], [(8, 0)]),
        ("90a-real", [(9, 0)], [(8, 0), (10, 0)]),
        ("80-virtual", [(8, 0), (9, 0), (12, 1)], [(7, 5)]),
        ("75", [(7, 5), (8, 0)], []),
        ("120-real", [(12, 0), (12, 1)], [(9, 0)]),
    ],
)
def test_code(arch: str, runs: list[tuple[int, int]], does_not: list[tuple[int, int]]) -> None:
    for capability in runs:
        assert devices.code_problem("GPU", capability, [arch]) == ""
    for capability in does_not:
        assert "MLA_CUDA_ARCHS=" in devices.code_problem("GPU", capability, [arch])


@pytest.fixture
def with_module(monkeypatch: pytest.MonkeyPatch) -> Callable[[FakeModule], _core.CpuBackend]:
    def use(module: FakeModule) -> _core.CpuBackend:
        monkeypatch.setattr(devices, "cuda_module", lambda: module)
        return _core.CpuBackend(_core.ThreadPool(1))

    return use


def test_devices_that_cannot_be_used_are_left_out(
    with_module: Callable[[FakeModule], _core.CpuBackend],
) -> None:
    cpu = with_module(FakeModule(gpus=[("Tesla V100", (7, 0)), H200]))
    found, note = devices.open_devices(cpu, "auto")
    assert found.cuda == (("cuda", 1, True),)
    assert note is not None
    assert note.startswith("cuda:0 is not used: Tesla V100 has compute capability 7.0")
    with pytest.raises(DeviceError, match="cuda:0: Tesla V100"):
        devices.open_devices(cpu, "cuda:0")
    assert devices.open_devices(cpu, "cuda:1")[0].cuda == (("cuda", 1, True),)
    old = with_module(FakeModule(problem="the driver is old"))
    with pytest.raises(DeviceError, match="device 'cuda': the driver is old"):
        devices.open_devices(old, "cuda")


# ---- where a model lies --------------------------------------------------------------------------


@pytest.mark.parametrize("numa", ["off", "shard", "interleave"])
def test_placement(cli: Cli, numa: str) -> None:
    result = cli("doctor", "--placement", small_model(), "--numa", numa)
    if "does not tell the nodes of pages" in result.err:
        pytest.skip(result.err)
    assert (result.status, result.err) == (0, "")
    assert f"numa: {numa}\n" in result.out
    assert "100.00 % of all pages lie where they belong" in result.out
    assert ("GB/s" in result.out) == (numa != "off")
    found = json.loads(cli("doctor", "--placement", small_model(), "--numa", numa, "--json").out)
    assert found["mode"] == numa
    assert found["local_share"] == 1.0
    assert 0.0 <= found["remote_reads"] <= 1.0
    assert sum(found["node_bytes"].values()) > 100_000
    assert all(part["n_local"] == part["n_pages"] for part in found["parts"])


def test_placement_of_no_model(cli: Cli, tmp_path: Path) -> None:
    result = cli("doctor", "--placement", tmp_path / "missing.gguf")
    assert result.status == 1
    assert "missing.gguf" in result.err
