"""Devices that run out of memory, get lost or cannot be used: one clear error, and the process goes
on. Each case is a process of its own: a lost device stays lost, and the environment is read once.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import pytest
from cuda.device import cuda_problem, is_emulated
from small_models import small_model

_TESTS = Path(__file__).parents[1]
_HEAD = """
import os, sys
from cuda.device import load_emulated
load_emulated()
from mla_backend import Model, devices, _core
from mla_backend.errors import DeviceError, MemoryLimitError

path = sys.argv[1]
IDS = [5, 3, 8, 13]
OPTIONS = dict(n_ctx=64, n_batch=8, precision="exact")

def error_of(f):
    try:
        f()
    except (DeviceError, MemoryLimitError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"
"""


@pytest.fixture(autouse=True)
def _device() -> None:
    if problem := cuda_problem():
        pytest.skip(problem)


def run(
    script: str, environment: Mapping[str, str] = MappingProxyType({}), *, says_more: bool = False
) -> list[str]:
    """Lines that the script prints. It must end well: no crash at exit, nothing on stderr.

    ``says_more``: other packages in the script may have something to say on stderr.
    """
    done = subprocess.run(
        [sys.executable, "-c", _HEAD + script, str(small_model("tiny-v2", "f32", n_layer=2))],
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join([str(_TESTS), *sys.path])}
        | dict(environment),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    quiet = says_more or not done.stderr
    assert done.returncode == 0, done.stdout + done.stderr
    assert quiet, done.stderr
    return done.stdout.splitlines()


_LOSE_EMULATED = """
def lose():
    os.environ["MLA_EMULATOR_LOST_AFTER"] = "0"
"""
_LOSE = """
import cupy
def lose():
    kernel = cupy.RawKernel('extern "C" __global__ void wrong() { asm("trap;"); }', "wrong")
    kernel((1,), (1,), ())
"""


def test_a_lost_device() -> None:
    if not is_emulated():
        pytest.importorskip("cupy", reason="something must make the device fault")
    lines = run(
        (_LOSE_EMULATED if is_emulated() else _LOSE)
        + """
model = Model.load(path, device="cuda", **OPTIONS)
session = model.session()
session.feed(IDS)
lose()
for call in (
    lambda: session.feed([7]),
    lambda: session.feed([7]),
    lambda: model.logits(IDS),
    lambda: model.session(),
    lambda: Model.load(path, device="cuda", **OPTIONS),
):
    print(error_of(call))
cpu = Model.load(path, device="cpu", **OPTIONS)
print(cpu.logits(IDS).shape[0])
auto = Model.load(path, **OPTIONS)
print(auto.logits(IDS).shape[0], *[note for note in auto.notes if "not used" in note])
""",
        says_more=not is_emulated(),
    )
    assert len(lines) == 7
    for line in lines[:5]:
        assert line.startswith("DeviceError: ")
        assert "CUDA devices are lost to this process" in line
        assert "start it again to use them" in line
    assert lines[5] == "4"
    assert lines[6].startswith("4 cuda:0 is not used: CUDA devices are lost to this process")


def test_out_of_memory_when_loading() -> None:
    lines = run(
        """
big = dict(OPTIONS, n_ctx=1 << 20 if os.environ.get("MLA_EMULATOR_MIB") else 1 << 30)
print(error_of(lambda: Model.load(path, device="cuda", gpu_layers=9, **big)))
model = Model.load(path, device="cuda", **OPTIONS)
print(model.logits(IDS).shape[0])
""",
        {"MLA_EMULATOR_MIB": "64"} if is_emulated() else {},
    )
    assert lines[0].startswith("MemoryLimitError: cuda:0 is out of memory: ")
    assert "bytes asked for" in lines[0]
    assert lines[1] == "4"


def test_out_of_memory_in_the_middle() -> None:
    """A batch of another shape needs a larger arena than there is: the next one is computed."""
    if not is_emulated():
        pytest.skip("nothing else takes the device's memory at the right time")
    lines = run(
        """
model = Model.load(path, device="cuda", **dict(OPTIONS, n_batch=1, n_ctx=4096))
session = model.session()
session.feed(IDS)
session._n_batch = 2048
module = devices.cuda_module()
free = module.device_info(0)["free_bytes"]
os.environ["MLA_EMULATOR_MIB"] = str(8192 - (free >> 20) + 2)
print(error_of(lambda: session.feed(IDS * 512)))
os.environ["MLA_EMULATOR_MIB"] = "8192"
print(len(session.tokens), session.feed([7]).shape[0], len(session.tokens))
"""
    )
    assert lines[0].startswith("MemoryLimitError: cuda:0 is out of memory: ")
    assert lines[1] == "4 1 5"


@pytest.mark.parametrize(
    ("environment", "problem"),
    [
        ({"CUDA_VISIBLE_DEVICES": ""}, "there is no CUDA device: CUDA_VISIBLE_DEVICES is ''"),
        ({"MLA_EMULATOR_DRIVER": "0"}, "no NVIDIA driver is installed"),
        ({"MLA_EMULATOR_DRIVER": "12040"}, "serves CUDA 12.4, and this build needs 13.0"),
        ({"MLA_EMULATOR_CAPABILITY": "70"}, "compute capability 7.0, accepted is 7.5 or later"),
    ],
    ids=["hidden", "no-driver", "old-driver", "too-old"],
)
def test_no_device_to_use(environment: dict[str, str], problem: str) -> None:
    if not is_emulated() and "CUDA_VISIBLE_DEVICES" not in environment:
        pytest.skip("the machine has what it has")
    lines = run(
        """
print(error_of(lambda: Model.load(path, device="cuda", **OPTIONS)))
auto = Model.load(path, **OPTIONS)
print(set(auto.placement.layers), auto.logits(IDS).shape[0])
""",
        environment,
    )
    assert lines[0].startswith("DeviceError: ")
    assert problem in lines[0]
    assert lines[1] == "{'cpu'} 4"
