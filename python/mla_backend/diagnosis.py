"""What this machine offers, what was built, and what of it can be used: facts for ``doctor``.

GPUs are looked for as the system shows them too, so that a missing module, a missing driver or an
old one can be told apart.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import psutil

from mla_backend import _core, devices, numa
from mla_backend.errors import MlaError
from mla_backend.threads import choose_threads
from mla_backend.tuned import TunedFile

#: The oldest driver for each major version of the CUDA runtime, as NVIDIA's release notes have it.
_OLDEST_DRIVER: Final = {11: "450.80.02", 12: "525.60.13", 13: "580"}
_REBUILD: Final = "MLA_CUDA=on pip install --force-reinstall --no-cache-dir, from the source"
_SMI: Final = (
    "nvidia-smi",
    "--query-gpu=name,compute_cap,memory.total,driver_version",
    "--format=csv,noheader,nounits",
)
_SMI_SECONDS: Final = 20.0  # it starts the driver where nothing keeps it loaded
_MIB: Final = 1 << 20


@dataclass(frozen=True)
class CpuFacts:
    """The processor, and the part of it that this process may use.

    Attributes:
        isa: the instruction set that kernels are chosen for; "" with ``problem``.
        available_isas: those that it has kernels for, best first.
        compiled_isas: those of this build.
        problem: why none is chosen.
    """

    model: str
    isa: str
    available_isas: tuple[str, ...]
    compiled_isas: tuple[str, ...]
    n_cores: int | None
    n_threads: int | None
    n_cores_usable: int
    n_threads_usable: int
    n_threads_chosen: int
    threads_reason: str
    problem: str = ""


@dataclass(frozen=True)
class NumaNode:
    """Memory, and the processors next to it.

    Attributes:
        cpus: as the kernel writes them: "0-15,32-47".
        usable_cpus: those of them that the affinity mask has.
        free_bytes: page cache counted as free.
        may_allocate: the cpuset and the memory policy allow this process to take memory here.
        distances: to all nodes, in their order.
    """

    number: int
    cpus: str
    memory_bytes: int
    usable_cpus: str = ""
    free_bytes: int = 0
    may_allocate: bool = True
    distances: tuple[int, ...] = ()


@dataclass(frozen=True)
class NumaFacts:
    """Nodes, and how models would use them.

    Attributes:
        groups: what ``--numa shard`` splits weights over, in words.
        mode: what ``--numa auto`` means here.
        policy: what numactl or the like asked of this process's memory: "bind 0", "default".
        advice: settings of the kernel that are worth a change.
    """

    nodes: tuple[NumaNode, ...]
    groups: tuple[str, ...]
    mode: str
    policy: str
    advice: tuple[str, ...] = ()


@dataclass(frozen=True)
class SystemGpu:
    """A GPU that the driver shows, whether or not CUDA can use it."""

    name: str
    capability: tuple[int, int] | None = None
    memory_bytes: int | None = None


@dataclass(frozen=True)
class CudaBuild:
    """The module of CUDA devices.

    Attributes:
        runtime: "13.0", linked into the module; None: there is no module.
        archs: what its kernels were compiled for.
        problem: why no device can be used through it; "" where one can.
        advice: what to do about that.
    """

    runtime: str | None = None
    archs: tuple[str, ...] = ()
    problem: str = ""
    advice: str = ""


@dataclass(frozen=True)
class Device:
    """A place to compute. ``problem``: why it cannot be used; "" where it can."""

    name: str
    description: str
    problem: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """Everything that ``doctor`` prints.

    Attributes:
        memory_available_bytes: what this process may still take, limits of its cgroup included.
        driver: version of the NVIDIA driver; None: none is loaded.
        driver_cuda: the newest CUDA runtime that it serves, where the module could ask.
        gpus: as the system shows them.
        devices: as models may use them.
    """

    cpu: CpuFacts
    numa: NumaFacts
    memory_available_bytes: int
    memory_total_bytes: int
    driver: str | None
    driver_cuda: str | None
    gpus: tuple[SystemGpu, ...]
    cuda: CudaBuild
    devices: tuple[Device, ...]


def diagnose(root: Path = Path("/")) -> Diagnosis:
    """Look at everything; nothing is changed. ``root`` stands before /proc and /sys."""
    cpu = _cpu(root)
    driver, gpus = _system_gpus(root)
    cuda, module = _cuda_build(driver, gpus)
    return Diagnosis(
        cpu=cpu,
        numa=_numa(root),
        memory_available_bytes=_core.available_memory_bytes(),
        memory_total_bytes=psutil.virtual_memory().total,
        driver=driver,
        driver_cuda=(_version(module.driver_version()) or None) if module is not None else None,
        gpus=gpus,
        cuda=cuda,
        devices=(Device("cpu", cpu.model, cpu.problem), *_cuda_devices(module, cuda)),
    )


def _cpu(root: Path) -> CpuFacts:
    isa, problem = "", ""
    try:
        isa = _core.CpuBackend(_core.ThreadPool(1)).isa
    except MlaError as error:  # MLA_CPU_ISA names one that is not here
        problem = str(error)
    known = TunedFile()
    choice = choose_threads(known)
    return CpuFacts(
        model=_cpu_model(root),
        isa=isa,
        available_isas=tuple(_core.available_isas()),
        compiled_isas=tuple(_core.compiled_isas()),
        n_cores=psutil.cpu_count(logical=False),
        n_threads=psutil.cpu_count(),
        n_cores_usable=_core.usable_physical_cores(),
        n_threads_usable=len(_core.usable_cpus()),
        n_threads_chosen=choice.n_threads,
        threads_reason="; ".join(text for text in (choice.reason, known.problem) if text),
        problem=problem,
    )


def _cpu_model(root: Path) -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", _text(root / "proc/cpuinfo"), re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def _numa(root: Path) -> NumaFacts:
    place = "" if root == Path("/") else str(root)
    topology = _core.read_topology(place)
    plan = numa.plan_numa("auto", root=place)
    mode, bound = topology.policy
    return NumaFacts(
        nodes=tuple(
            NumaNode(
                number=node.id,
                cpus=numa.ranges([cpu.cpu for cpu in node.cpus]),
                memory_bytes=node.total_bytes,
                usable_cpus=numa.ranges(node.usable),
                free_bytes=node.free_bytes,
                may_allocate=node.may_allocate,
                distances=tuple(node.distance),
            )
            for node in topology.nodes
        ),
        groups=tuple(group.text for group in plan.groups),
        mode=plan.mode,
        policy=f"{mode} {numa.ranges(bound)}".strip(),
        advice=tuple(_numa_advice(root, plan)),
    )


def _numa_advice(root: Path, plan: numa.NumaPlan) -> Iterator[str]:
    yield from plan.notes
    if len(plan.nodes) < 2:
        return
    if _text(root / "proc/sys/kernel/numa_balancing").strip() not in ("", "0"):
        yield (
            "automatic NUMA balancing is on: it takes time to look for pages to move, and weights "
            "are placed already; off: sysctl kernel.numa_balancing=0"
        )
    if "[never]" in _text(root / "sys/kernel/mm/transparent_hugepage/enabled"):
        yield (
            "transparent huge pages are off, which costs address translations; "
            "on: echo madvise > /sys/kernel/mm/transparent_hugepage/enabled"
        )


# ---- GPUs as the system shows them ---------------------------------------------------------------


def _system_gpus(root: Path) -> tuple[str | None, tuple[SystemGpu, ...]]:
    """The driver's version, and its GPUs: by its own tool, else as the kernel shows them."""
    rows = [re.split(r",\s*", line.strip()) for line in _ask_smi().splitlines()]
    rows = [row for row in rows if len(row) == 4]
    if rows:
        return rows[0][3], tuple(_from_smi(*row[:3]) for row in rows)
    driver = root / "proc/driver/nvidia"
    version = re.search(r"Kernel Module.*?\s(\d+(?:\.\d+)+)\s", _text(driver / "version"))
    models = [
        re.search(r"^Model:\s*(.+)$", _text(path), re.MULTILINE)
        for path in sorted(driver.glob("gpus/*/information"))
    ]
    gpus = tuple(SystemGpu(found[1].strip() if found else "unknown") for found in models)
    return (version[1] if version else None), gpus


def _ask_smi() -> str:
    """What the driver's tool says; "" where it is not there or fails."""
    try:
        done = subprocess.run(
            _SMI, capture_output=True, text=True, timeout=_SMI_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _from_smi(name: str, capability: str, memory: str) -> SystemGpu:
    """Fields that an old tool does not know, or a GPU does not tell, stay open."""
    parts = re.fullmatch(r"(\d+)\.(\d+)", capability)
    return SystemGpu(
        name,
        (int(parts[1]), int(parts[2])) if parts else None,
        int(memory) * _MIB if memory.isdecimal() else None,
    )


# ---- what was built, and what of it works --------------------------------------------------------


def _cuda_build(driver: str | None, gpus: tuple[SystemGpu, ...]) -> tuple[CudaBuild, Any]:
    """The module's facts, and the module."""
    try:
        module: Any = devices.cuda_module()
    except ImportError as error:
        return CudaBuild(problem=f"the module does not load: {error}", advice=_REBUILD), None
    if module is None:
        advice = _REBUILD if gpus or driver else ""
        return CudaBuild(problem="this install was built without CUDA", advice=advice), None
    runtime = module.runtime_version()
    problem = str(module.device_problem())
    return (
        CudaBuild(
            runtime=_version(runtime),
            archs=tuple(module.compiled_archs()),
            problem=problem,
            advice=_advice(module, driver, gpus) if problem else "",
        ),
        module,
    )


def _advice(module: Any, driver: str | None, gpus: tuple[SystemGpu, ...]) -> str:
    major = module.runtime_version() // 1000
    oldest = _OLDEST_DRIVER.get(major)
    least = f"a driver of version {oldest} or later serves CUDA {major}" if oldest else ""
    if module.driver_version() == 0:
        shown = f"the kernel has driver {driver}, but libcuda.so was not found" if driver else ""
        return "; ".join(text for text in (shown, least) if text)
    if module.driver_version() // 1000 < major:
        return least
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and gpus:
        return f"CUDA_VISIBLE_DEVICES is {visible!r}, which hides them"
    return ""


def _cuda_devices(module: Any, cuda: CudaBuild) -> Iterator[Device]:
    if module is None or cuda.problem:
        return
    for number in range(module.device_count()):
        name = f"cuda:{number}"
        try:
            info = module.device_info(number)
            problem = devices.device_problem(number)
        except MlaError as error:
            yield Device(name, "unknown", str(error))
            continue
        major, minor = info["capability"]
        gib = info["total_bytes"] / (1 << 30)
        free = info["free_bytes"] / (1 << 30)
        yield Device(
            name,
            f"{info['name']}, capability {major}.{minor}, {gib:.1f} GiB, {free:.1f} GiB free",
            problem,
        )


def _version(number: int) -> str:
    """13020 is "13.2"; 0 is ""."""
    return f"{number // 1000}.{number % 1000 // 10}" if number else ""


def _text(path: Path) -> str:
    """The file's text; "" where there is none or it cannot be read."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
