"""Which kernels of a CUDA module some runs have launched, and which they have not.

Usage: kernel_coverage.py MODULE TRACE

TRACE is what the environment variable MLA_CUDA_TRACE made of the runs. The kernels of MODULE are
read by cuobjdump, of which the toolkit has one. Exit status 1: some kernel was never launched.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path


def kernels_of(module: Path) -> set[str]:
    """Mangled names of the kernels that a module has code for."""
    listing = subprocess.run(
        ["cuobjdump", "--dump-elf-symbols", str(module)], capture_output=True, text=True, check=True
    ).stdout
    return set(re.findall(r"STO_ENTRY\s+(\S+)", listing))


def readable(names: list[str]) -> list[str]:
    """Demangled where the machine can."""
    try:
        done = subprocess.run(
            ["c++filt", "-p"], input="\n".join(names), capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return names
    return done.stdout.splitlines()


def main(module: Path, trace: Path) -> int:
    """Print what is missing."""
    launched = set(trace.read_text().split()) if trace.exists() else set()
    kernels = kernels_of(module)
    missing = sorted(kernels - launched)
    sys.stdout.write(f"{len(kernels) - len(missing)} of {len(kernels)} kernels launched\n")
    sys.stdout.writelines(f"never launched: {name}\n" for name in readable(missing))
    return 1 if missing or not kernels else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
