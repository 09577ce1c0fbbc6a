"""``version``: the package, and what it found here."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version

from .console import write_json, write_stdout
from .options import DebugOptions, JsonOptions


def version(output: JsonOptions, debug: DebugOptions) -> None:
    """Print the version, and the instruction sets of this machine."""
    from mla_backend import _core

    facts: dict[str, object] = {
        "version": _package_version(),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "isa": _core.available_isas()[0],
        "isas": list(_core.available_isas()),
        "cores": _core.usable_physical_cores(),
    }
    if output.as_json:
        write_json(facts)
        return
    isas = ", ".join(_core.available_isas())
    write_stdout(
        f"mla_backend {facts['version']}\n"
        f"Python {facts['python']} on {facts['machine']}\n"
        f"instruction set: {facts['isa']} (available: {isas}), {facts['cores']} cores\n"
    )


def _package_version() -> str:
    try:
        return installed_version("mla_backend")
    except PackageNotFoundError:
        return "unknown (not installed)"
