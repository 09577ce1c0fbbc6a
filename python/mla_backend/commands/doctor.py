"""``doctor``: what this machine offers, what was built, and what is not used and why."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

from .console import write_json, write_stdout
from .options import DebugOptions, JsonOptions
from .units import bytes_text

if TYPE_CHECKING:
    from ..diagnosis import CpuFacts, Diagnosis, SystemGpu

Line = tuple[str, str]


def doctor(output: JsonOptions, debug: DebugOptions) -> None:
    """Show the CPU, the GPUs and the driver, what was built, and what can be used."""
    from ..diagnosis import diagnose

    found = diagnose()
    if output.as_json:
        write_json(asdict(found))
        return
    lines = [*_host_lines(found), *_cuda_lines(found), *_device_lines(found)]
    write_stdout("".join(f"{name + ':' if name else '':8} {text}\n" for name, text in lines))


def _host_lines(found: Diagnosis) -> Iterator[Line]:
    cpu = found.cpu
    yield "cpu", cpu.model
    yield "", f"{_cores(cpu)} usable"
    chosen = cpu.isa or f"none: {cpu.problem}"
    yield "isa", f"{chosen} (this CPU has {', '.join(cpu.available_isas)})"
    lacking = [isa for isa in cpu.compiled_isas if isa not in cpu.available_isas]
    if lacking:
        yield "", f"built, but not of this CPU: {', '.join(lacking)}"
    for node in found.numa:
        yield (
            "" if node.number else "numa",
            f"node {node.number}: CPUs {node.cpus or 'none'}, {bytes_text(node.memory_bytes)}",
        )
    if not found.numa:
        yield "numa", "not shown by this kernel"
    yield (
        "memory",
        f"{bytes_text(found.memory_available_bytes)} available to this process, "
        f"{bytes_text(found.memory_total_bytes)} in all",
    )


def _cores(cpu: CpuFacts) -> str:
    cores, threads = cpu.n_cores or "?", cpu.n_threads or "?"
    return (
        f"{cpu.n_cores_usable} of {cores} physical cores, "
        f"{cpu.n_threads_usable} of {threads} logical"
    )


def _cuda_lines(found: Diagnosis) -> Iterator[Line]:
    serves = f", serves CUDA {found.driver_cuda}" if found.driver_cuda else ""
    yield "driver", f"NVIDIA {found.driver}{serves}" if found.driver else "no NVIDIA driver"
    for index, gpu in enumerate(found.gpus):
        yield "" if index else "gpus", _gpu(gpu)
    if not found.gpus:
        yield "gpus", "none seen"
    build = found.cuda
    if build.runtime is None:
        yield "cuda", build.problem
    else:
        yield "cuda", f"built with runtime {build.runtime} for {', '.join(build.archs)}"
        if build.problem:
            yield "", f"no device can be used: {build.problem}"
    if build.advice:
        yield "", build.advice


def _gpu(gpu: SystemGpu) -> str:
    capability = ".".join(map(str, gpu.capability)) if gpu.capability else "unknown"
    memory = f", {bytes_text(gpu.memory_bytes)}" if gpu.memory_bytes else ""
    return f"{gpu.name}, capability {capability}{memory}"


def _device_lines(found: Diagnosis) -> Iterator[Line]:
    for index, device in enumerate(found.devices):
        verdict = f"not usable: {device.problem}" if device.problem else "usable"
        yield "" if index else "devices", f"{device.name:7} {verdict} ({device.description})"
