"""Mapped and loaded files, and what the machine has."""

from __future__ import annotations

import gc
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from mla_backend import _core
from mla_backend.errors import DeviceError, MemoryLimitError, ShapeError

PAGE = os.sysconf("SC_PAGE_SIZE")
READERS = [_core.MappedFile, _core.LoadedFile]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "numbers.bin"
    # More than one piece of the parallel reader, and no whole number of pages.
    path.write_bytes(np.arange(5_000_001, dtype=np.uint32).tobytes()[:-3])
    return path


@pytest.mark.parametrize("reader", READERS)
def test_holds_the_bytes(reader: type, file: Path) -> None:
    opened = reader(str(file))
    assert opened.size == file.stat().st_size
    assert opened.path == str(file)
    assert bytes(memoryview(opened)) == file.read_bytes()
    opened.check()


@pytest.mark.parametrize("reader", READERS)
def test_views_are_read_only_and_keep_the_memory(reader: type, file: Path) -> None:
    view = np.frombuffer(reader(str(file)), np.uint32, count=1000, offset=8)
    gc.collect()
    assert not view.flags.writeable
    np.testing.assert_array_equal(view, np.arange(2, 1002))
    with pytest.raises((TypeError, BufferError, ValueError)):
        memoryview(reader(str(file)))[0] = 1


@pytest.mark.parametrize("reader", READERS)
def test_empty_file(reader: type, tmp_path: Path) -> None:
    path = tmp_path / "empty"
    path.touch()
    opened = reader(str(path))
    assert opened.size == 0
    assert bytes(memoryview(opened)) == b""
    opened.check()


@pytest.mark.parametrize("reader", READERS)
def test_refuses_what_is_no_file(reader: type, tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="missing: cannot be opened: No such file"):
        reader(str(tmp_path / "missing"))
    with pytest.raises(DeviceError, match="is no regular file"):
        reader(str(tmp_path))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DeviceError, match="is no regular file"):
        reader(str(tmp_path / "pipe"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("reader", READERS)
def test_names_missing_permission(reader: type, file: Path) -> None:
    file.chmod(0)
    with pytest.raises(DeviceError, match="Permission denied"):
        reader(str(file))


@pytest.mark.parametrize("threads", [0, 1, 3, 64])
def test_progress_ends_at_the_size(file: Path, threads: int) -> None:
    seen: list[tuple[int, int]] = []
    _core.LoadedFile(str(file), threads, lambda done, total: seen.append((done, total)))
    size = file.stat().st_size
    assert seen[-1] == (size, size)
    assert seen == sorted(seen)


def test_progress_may_stop_the_reading(file: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyError(total)

    with pytest.raises(KeyError):
        _core.LoadedFile(str(file), 2, stop)


def test_too_large_to_load(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as out:
        out.truncate(1 << 40)
    limit = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (1 << 39, limit[1]))
    try:
        with pytest.raises(MemoryLimitError, match=f"cannot allocate {1 << 40} bytes"):
            _core.LoadedFile(str(path))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limit)


def test_locked(file: Path) -> None:
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    refusal = ""
    try:
        assert bytes(memoryview(_core.MappedFile(str(file), mlock=True))) == file.read_bytes()
    except DeviceError as error:
        refusal = str(error)
    if refusal:  # the limit is low here, and the message names it
        assert "bytes cannot be locked in memory" in refusal
        assert refusal.endswith(f"(ulimit -l) is {limit} bytes")


def test_prefetch(file: Path) -> None:
    mapped = _core.MappedFile(str(file))
    mapped.prefetch(0, mapped.size)
    mapped.prefetch(PAGE + 17, 1)
    mapped.prefetch(mapped.size, 0)
    for offset, n_bytes in [(-1, 2), (0, mapped.size + 1), (mapped.size, 1), (0, -1)]:
        with pytest.raises(ShapeError, match="outside"):
            mapped.prefetch(offset, n_bytes)


# ---- files that shrink ---------------------------------------------------------------------------

SHRINK = """
import faulthandler, os, sys
import numpy as np
from mla_backend import _core
from mla_backend.errors import DeviceError

path, reader, keep, late = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4] == "late"
if not late:
    faulthandler.enable()
mapped = _core.MappedFile(path)
other = _core.MappedFile(path + ".other")
if late:
    faulthandler.enable()
    _core.MappedFile(path)  # takes the signal back
os.truncate(path, keep)
data = np.frombuffer(mapped, np.uint8)
if reader == "python":
    lost = data[keep:].any()
else:
    k = data.size // 34 * 32
    lost = _core.dequantize(data[None, : k // 32 * 34], "Q8_0", k)[0, keep:].any()
assert not lost
try:
    mapped.check()
except DeviceError as error:
    print(error)
other.check()
assert np.frombuffer(other, np.uint8).all()
"""


def run_python(source: str, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", source, *args], capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("reader", ["python", "native"])
@pytest.mark.parametrize("keep", [0, 3 * PAGE, 3 * PAGE + 100])
@pytest.mark.parametrize("order", ["early", "late"])
def test_shrunk_file_is_an_error(tmp_path: Path, reader: str, keep: int, order: str) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"\x01" * (300 * PAGE + 5))
    (tmp_path / "weights.other").write_bytes(b"\x01" * 5000)
    done = run_python(SHRINK, str(path), reader, str(keep), order)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{path}: the file shrank or cannot be read any more")


def test_loss_within_the_last_page_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"\x01" * 100)
    mapped = _core.MappedFile(str(path))
    os.truncate(path, 50)
    with pytest.raises(DeviceError, match="shrank"):
        mapped.check()


@pytest.mark.parametrize("debugging_aid", ["", "import faulthandler; faulthandler.enable()"])
def test_faults_elsewhere_still_end_the_process(tmp_path: Path, debugging_aid: str) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"\x01" * PAGE)
    foreign = """
import mmap, os, sys
from mla_backend import _core
AID
mapped = _core.MappedFile(sys.argv[1])
with open(sys.argv[1] + ".foreign", "w+b") as file:
    file.truncate(4096)
    view = mmap.mmap(file.fileno(), 4096)
    file.truncate(0)
    view[0]
""".replace("AID", debugging_aid)
    done = run_python(foreign, str(path))
    assert done.returncode == -signal.SIGBUS
    assert ("Bus error" in done.stderr) == bool(debugging_aid)


# ---- the machine ---------------------------------------------------------------------------------


def test_available_memory() -> None:
    available = _core.available_memory_bytes()
    assert 0 < available <= os.sysconf("SC_PHYS_PAGES") * PAGE


def test_address_space_limit_counts() -> None:
    limited = """
import resource
from mla_backend import _core
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, resource.RLIM_INFINITY))
print(_core.available_memory_bytes())
"""
    done = run_python(limited)
    assert 0 < int(done.stdout) < 2 << 30, done.stderr


def made_up_machine(root: Path, mountinfo: str, cgroup: str, files: dict[str, str]) -> str:
    files = {
        "proc/meminfo": "MemTotal: 8000000 kB\nMemAvailable:   4000000 kB\n",
        "proc/self/mountinfo": mountinfo,
        "proc/self/cgroup": cgroup,
    } | files
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return str(root)


V2_MOUNT = "30 23 0:26 / /sys/fs/cgroup rw shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
V1_MOUNT = (
    "35 31 0:32 /docker/abc /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
    "36 31 0:33 /docker/abc /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpuacct,cpu\n"
)


def test_machine_without_cgroups(tmp_path: Path) -> None:
    root = made_up_machine(tmp_path, "", "", {})
    assert _core.available_memory_bytes(root) == 4_000_000 * 1024


def test_cgroup_v2_limits_of_ancestors_count(tmp_path: Path) -> None:
    base = "sys/fs/cgroup"
    files = {
        f"{base}/a/b/memory.max": "max\n",
        f"{base}/a/b/memory.current": "700\n",
        f"{base}/a/memory.max": "10000\n",
        f"{base}/a/memory.current": "9000\n",
        f"{base}/a/memory.stat": "anon 1000\nactive_file 2000\ninactive_file 500\n",
        f"{base}/a/b/cpu.max": "max 100000\n",
        f"{base}/a/cpu.max": "50000 100000\n",
    }
    root = made_up_machine(tmp_path, V2_MOUNT, "0::/a/b\n", files)
    assert _core.available_memory_bytes(root) == 10000 - (9000 - 2500)
    assert _core.usable_physical_cores(root) == 1


def test_cgroup_v1_in_a_container(tmp_path: Path) -> None:
    base = "sys/fs/cgroup/memory"
    files = {
        f"{base}/memory.limit_in_bytes": "5000\n",
        f"{base}/memory.usage_in_bytes": "3000\n",
        f"{base}/memory.stat": "total_active_file 100\ntotal_inactive_file 200\n",
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
        "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
    }
    cgroup = "5:cpuacct,cpu:/docker/abc\n4:memory:/docker/abc\n0::/\n"
    root = made_up_machine(tmp_path, V1_MOUNT, cgroup, files)
    assert _core.available_memory_bytes(root) == 5000 - (3000 - 300)
    assert _core.usable_physical_cores(root) >= 1


def test_group_beyond_its_limit_leaves_nothing(tmp_path: Path) -> None:
    files = {"sys/fs/cgroup/memory.max": "5000\n", "sys/fs/cgroup/memory.current": "6000\n"}
    assert _core.available_memory_bytes(made_up_machine(tmp_path, V2_MOUNT, "0::/\n", files)) == 0


def test_hardware_threads_of_a_core_count_once(tmp_path: Path) -> None:
    cpus = _core.usable_cpus()
    assert cpus == sorted(os.sched_getaffinity(0))
    files = {
        f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list": f"0-{max(cpus)}\n"
        for cpu in cpus
    }
    assert _core.usable_physical_cores(made_up_machine(tmp_path, "", "", files)) == 1
    assert 1 <= _core.usable_physical_cores() <= len(cpus)


def test_file_systems(tmp_path: Path) -> None:
    assert isinstance(_core.is_network_fs(str(tmp_path)), bool)
    assert not _core.is_network_fs("/proc")
    with pytest.raises(DeviceError, match="file system cannot be examined"):
        _core.is_network_fs(str(tmp_path / "missing"))
