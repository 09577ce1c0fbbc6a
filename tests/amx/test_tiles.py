"""Kernels by tiles, with the tiles spelled out: they are right before any machine has AMX."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from mla_backend import _core

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
FLAGS = ["-std=c++20", "-O2", "-Wall", "-Wextra", f"-I{CSRC}"]
KERNEL_FLAGS = [
    *("-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"),
    *("-mavx512vnni", "-mavx512bf16", "-Wno-psabi", "-Wno-ignored-attributes"),
    *("-Wno-unused-function", "-fno-exceptions", "-fno-rtti"),
    *("-DMLA_ISA=isa_avx512amx", "-DMLA_ISA_AVX512BF16=1", "-DMLA_ISA_AVX512AMX=1"),
]
KERNELS = CSRC / "backends/cpu/kernels"
SLAB = KERNELS / "slab.inc.cpp"


def compiled(source: Path, out: Path, *flags: str) -> Path:
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("c++ is not installed")
    subprocess.run([compiler, *FLAGS, *flags, "-c", source, "-o", out], check=True)
    return out


@pytest.fixture(autouse=True)
def x86_64() -> None:
    if "avx512amx" not in _core.compiled_isas():
        pytest.skip("AMX is of x86-64")


@pytest.mark.parametrize(
    ("kernels", "check"), [("slab", "check_tiles"), ("attention", "check_attention")]
)
def test_emulated(tmp_path: Path, kernels: str, check: str) -> None:
    if "avx512bf16" not in _core.available_isas():
        pytest.skip("this CPU lacks avx512bf16")
    twin = Path(__file__).with_name("emulated_tiles.h")
    emulated = ["-DMLA_AMX_EMULATED=1", "-include", str(twin)]
    source = KERNELS / f"{kernels}.inc.cpp"
    objects = [compiled(source, tmp_path / f"{kernels}.o", *KERNEL_FLAGS, *emulated)]
    sources = [Path(__file__).parent / f"{check}.cpp", *(CSRC / "quant").glob("*.cpp")]
    objects += [compiled(source, tmp_path / f"{source.stem}.o") for source in sources]
    program = tmp_path / check
    subprocess.run(["c++", *objects, "-o", program], check=True)
    found = subprocess.run([program], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def test_instructions(tmp_path: Path) -> None:
    """The real thing consists of the instructions that were spelled out, sums first."""
    if shutil.which("objdump") is None:
        pytest.skip("objdump is not installed")
    slab = compiled(SLAB, tmp_path / "slab.o", *KERNEL_FLAGS)
    listing = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", slab], check=True, capture_output=True, text=True
    ).stdout
    for sum, x, w in ((0, 4, 6), (1, 4, 7), (2, 5, 6), (3, 5, 7)):
        assert f"tdpbf16ps %tmm{w},%tmm{x},%tmm{sum}" in listing
    assert listing.count("tilerelease") >= listing.count("ldtilecfg") > 0
