"""``doctor``: what this machine offers, what was built, and what is not used and why."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from .console import write_json, write_stdout
from .loading import placement_lines
from .options import DebugOptions, JsonOptions, PlacementOptions
from .progress import ProgressReporter
from .units import bytes_text

if TYPE_CHECKING:
    from ..diagnosis import CpuFacts, Diagnosis, NumaFacts, NumaNode, SystemGpu

Line = tuple[str, str]
#: What ``--placement`` generates to see who reads what.
_SAMPLE_TOKENS = 8


def doctor(model: PlacementOptions, output: JsonOptions, debug: DebugOptions) -> None:
    """Show the CPU, its memory nodes, the GPUs, what was built, and what can be used."""
    from ..diagnosis import diagnose

    if model.placement is not None:
        _show_placement(model.placement, model, output)
        return
    found = diagnose()
    if output.as_json:
        write_json(asdict(found))
        return
    lines = [*_host_lines(found), *_cuda_lines(found), *_device_lines(found)]
    write_stdout("".join(f"{name + ':' if name else '':8} {text}\n" for name, text in lines))


def _show_placement(path: Path, options: PlacementOptions, output: JsonOptions) -> None:
    from ..model import Model

    progress = ProgressReporter(enabled=not output.as_json)
    loading = Model.load(
        path,
        device="cpu",
        numa=options.numa.value,
        numa_nodes=options.numa_nodes,
        on_progress=progress,
    )
    with loading as model:
        progress.clear()
        with model.counting_reads() as traffic:
            model.generate([0], max_tokens=_SAMPLE_TOKENS, temperature=0.0)
        report = model.placement_report()
        if output.as_json:
            facts = {"mode": model.numa.mode, "notes": model.notes}
            more = {
                "local_share": report.local_share,
                "node_bytes": report.node_bytes,
                "remote_reads": traffic.remote_share,
                "thread_reads": traffic.by_thread,
            }
            loads = [asdict(load) for load in model.loaded]
            write_json({**facts, **asdict(report), **more, "loads": loads})
            return
        lines = [
            f"numa: {model.numa.mode}",
            *(f"note: {note}" for note in model.numa.notes),
            *(load.text for load in model.loaded),
            *placement_lines(report),
            f"{100 * (1 - traffic.remote_share):.2f} % of the weights are read from the reader's "
            "own nodes",
        ]
        write_stdout("".join(f"{line}\n" for line in lines))


def _host_lines(found: Diagnosis) -> Iterator[Line]:
    cpu = found.cpu
    yield "cpu", cpu.model
    yield "", f"{_cores(cpu)} usable"
    yield "threads", f"{cpu.n_threads_chosen}: {cpu.threads_reason}"
    chosen = cpu.isa or f"none: {cpu.problem}"
    yield "isa", f"{chosen} (this CPU has {', '.join(cpu.available_isas)})"
    lacking = [isa for isa in cpu.compiled_isas if isa not in cpu.available_isas]
    if lacking:
        yield "", f"built, but not of this CPU: {', '.join(lacking)}"
    yield from _numa_lines(found.numa)
    yield (
        "memory",
        f"{bytes_text(found.memory_available_bytes)} available to this process, "
        f"{bytes_text(found.memory_total_bytes)} in all",
    )


def _numa_lines(numa: NumaFacts) -> Iterator[Line]:
    for index, node in enumerate(numa.nodes):
        yield "" if index else "numa", _node(node)
    if not numa.nodes:
        yield "numa", "not shown by this kernel"
    if len(numa.nodes) < 2:
        return
    yield "", f"memory policy of this process: {numa.policy}"
    yield "", f"--numa auto is {numa.mode} here; nodes of a socket at distance 15 or less are one"
    for group in numa.groups:
        yield "", f"group of {group}"
    for text in numa.advice:
        yield "", text


def _node(node: NumaNode) -> str:
    text = f"node {node.number}: CPUs {node.cpus or 'none'}"
    if node.usable_cpus != node.cpus:
        text += f" ({node.usable_cpus or 'none'} usable)"
    text += f", {bytes_text(node.memory_bytes)}"
    if node.may_allocate:
        text += f", {bytes_text(node.free_bytes)} free"
    elif node.memory_bytes:
        text += ", not for this process"
    return text + (f", distances {' '.join(map(str, node.distances))}" if node.distances else "")


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
