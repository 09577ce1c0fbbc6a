"""Made-up machines: trees of /proc and /sys as kernels would show them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

GIB_KB = 1 << 20


@dataclass(frozen=True)
class Node:
    """A node of a made-up machine. ``cpus``: (cpu, first thread of its core, package, L3)."""

    number: int
    cpus: Sequence[tuple[int, int, int, int]] = ()
    total_kb: int = 64 * GIB_KB
    free_kb: int = 60 * GIB_KB
    distance: Sequence[int] = field(default=())


def make_machine(
    root: Path,
    nodes: Sequence[Node],
    *,
    allowed_cpus: str | None = None,
    allowed_nodes: str | None = None,
) -> str:
    """Write the tree; returns what to give as ``root``."""
    for node in nodes:
        directory = root / f"sys/devices/system/node/node{node.number}"
        directory.mkdir(parents=True)
        _write(directory / "cpulist", ",".join(str(cpu[0]) for cpu in node.cpus))
        _write(directory / "distance", " ".join(map(str, node.distance)))
        prefix = f"Node {node.number} "
        cached_kb = node.free_kb // 4  # free memory is part page cache
        lines = [
            f"MemTotal:       {node.total_kb} kB",
            f"MemFree:        {node.free_kb - cached_kb} kB",
            f"Active(file):   {cached_kb // 2} kB",
            f"Inactive(file): {cached_kb - cached_kb // 2} kB",
            "HugePages_Total:     0",
            "HugePages_Free:      0",
        ]
        _write(directory / "meminfo", "\n".join(prefix + line for line in lines))
        for cpu, core, package, l3 in node.cpus:
            place = root / f"sys/devices/system/cpu/cpu{cpu}"
            (place / "topology").mkdir(parents=True)
            (place / "cache/index3").mkdir(parents=True)
            _write(place / "topology/physical_package_id", str(package))
            siblings = f"{core},{cpu}" if core != cpu else f"{cpu}"
            _write(place / "topology/thread_siblings_list", siblings)
            _write(place / "cache/index3/shared_cpu_list", f"{l3}-{l3 + 7}")
    status = root / "proc/thread-self"
    status.mkdir(parents=True)
    lines = ["Name:\tpython"]
    lines += [f"Cpus_allowed_list:\t{allowed_cpus}"] if allowed_cpus is not None else []
    lines += [f"Mems_allowed_list:\t{allowed_nodes}"] if allowed_nodes is not None else []
    _write(status / "status", "\n".join(lines))
    return str(root)


def sockets(
    n_sockets: int,
    nodes_per_socket: int,
    cores_per_node: int,
    near: Callable[[int, int], int],
    *,
    smt: bool = True,
    total_kb: int = 64 * GIB_KB,
) -> list[Node]:
    """Equal nodes. ``near(i, j)``: distance of two nodes within a socket; across it is 32."""
    n_nodes = n_sockets * nodes_per_socket
    n_cores = n_nodes * cores_per_node
    nodes = []
    for number in range(n_nodes):
        socket = number // nodes_per_socket
        first = number * cores_per_node
        cpus = [(c, c, socket, c // 8 * 8) for c in range(first, first + cores_per_node)]
        if smt:
            cpus += [(c + n_cores, c, package, l3) for c, _, package, l3 in cpus]
        distance = [
            10
            if other == number
            else near(number, other)
            if other // nodes_per_socket == socket
            else 32
            for other in range(n_nodes)
        ]
        nodes.append(Node(number, cpus, total_kb, total_kb * 15 // 16, distance))
    return nodes


def _write(path: Path, text: str) -> None:
    path.write_text(text + "\n")
