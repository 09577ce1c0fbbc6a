"""The pool of workers, through operations that use it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import numpy as np
import numpy.typing as npt
import pytest
from mla_backend import _core
from mla_backend.errors import DeviceError, ShapeError

CPUS = sorted(os.sched_getaffinity(0))
RNG = np.random.default_rng(1)
X = RNG.standard_normal((7, 300), dtype=np.float32)
W = RNG.standard_normal((513, 300), dtype=np.float32)


def product(pool: _core.ThreadPool) -> npt.NDArray[np.float32]:
    """X W^T on a pool."""
    g = _core.Graph()
    x = g.input("x", "F32", list(X.shape))
    g.output(g.matmul(x, g.weight("w", _core.Tensor(W, "F32", list(W.shape))), precision="exact"))
    executor = _core.Executor(g, _core.Workspace([_core.CpuBackend(pool)]))
    executor.run({"x": X})
    return np.array(executor.output(0))


def n_threads_of_this_process() -> int:
    return len(os.listdir("/proc/self/task"))


def n_pinned(others: set[str]) -> int:
    """Threads on the first CPU alone, without those of ``others``."""
    tasks = set(os.listdir("/proc/self/task")) - others
    return sum(os.sched_getaffinity(int(task)) == {CPUS[0]} for task in tasks)


def test_threads_are_started_and_ended() -> None:
    before = n_threads_of_this_process()
    pool = _core.ThreadPool(5)
    assert pool.n_threads == 5
    assert n_threads_of_this_process() == before + 4  # the caller is one of them
    del pool
    until = time.monotonic() + 10
    while n_threads_of_this_process() > before and time.monotonic() < until:
        time.sleep(0.01)
    assert n_threads_of_this_process() == before


def test_automatic_count() -> None:
    assert _core.ThreadPool().n_threads == _core.usable_physical_cores()


@pytest.mark.parametrize("n_threads", [1, 2, 3, 8, 33])
def test_counts_do_not_change_a_bit(n_threads: int) -> None:
    want = product(_core.ThreadPool(1))
    pool = _core.ThreadPool(n_threads)
    for _ in range(20):
        np.testing.assert_array_equal(product(pool), want)
    error = want - X.astype(np.float64) @ W.astype(np.float64).T
    assert np.abs(error).max() < 1e-4


def test_affinity() -> None:
    others = set(os.listdir("/proc/self/task"))
    pool = _core.ThreadPool(3, cpus=CPUS[:1])
    np.testing.assert_array_equal(product(pool), product(_core.ThreadPool(1)))
    until = time.monotonic() + 10  # a worker pins itself when it first runs
    while n_pinned(others) < 2 and time.monotonic() < until:
        time.sleep(0.01)
    assert n_pinned(others) == 2


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"n_threads": -1}, ShapeError, "-1 threads, accepted is 0"),
        ({"n_threads": 5000}, ShapeError, "5000 threads"),
        ({"n_threads": 2, "cpus": [max(CPUS) + 1]}, DeviceError, "is not among those"),
        ({"n_threads": 2, "cpus": [-1]}, DeviceError, "CPU -1"),
        ({"nodes": [_core.NodeShare([0], [max(CPUS) + 1], 1)]}, DeviceError, "is not among those"),
        ({"nodes": [_core.NodeShare([0], [], 1)]}, DeviceError, "no node has CPUs"),
        ({"nodes": [_core.NodeShare([0], CPUS, 1)] * 33}, DeviceError, "at most 32"),
    ],
)
def test_wrong_options(options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        _core.ThreadPool(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("spin_us", [0, 50, 5000])
def test_workers_sleep_and_wake(spin_us: int) -> None:
    pool = _core.ThreadPool(3, spin_us=spin_us)
    want = product(_core.ThreadPool(1))
    for _ in range(5):
        time.sleep(0.02)
        np.testing.assert_array_equal(product(pool), want)


def test_idle_workers_use_no_processor() -> None:
    """In a process of its own, whose time is not that of other tests' threads."""
    source = """
import time
from mla_backend import _core
pool = _core.ThreadPool(4)
time.sleep(0.1)
before = time.process_time()
time.sleep(0.5)
print(time.process_time() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, timeout=60, check=True
    )
    assert float(done.stdout) < 0.1


@pytest.mark.parametrize("n_nodes", [1, 2, 4])
@pytest.mark.parametrize("n_threads", [1, 3, 8])
def test_nodes_do_not_change_a_bit(n_nodes: int, n_threads: int) -> None:
    """Made-up nodes, all with the same CPUs; one of four has none."""
    nodes = [_core.NodeShare([0], CPUS if i < 3 else [], 1 + i) for i in range(n_nodes)]
    pool = _core.ThreadPool(n_threads, nodes=nodes)
    assert pool.n_nodes == n_nodes
    assert {pool.node_of(i) for i in range(n_threads)} <= set(range(min(n_nodes, 3)))
    want = product(_core.ThreadPool(1))
    for _ in range(20):
        np.testing.assert_array_equal(product(pool), want)


def test_threads_run_on_the_cpus_of_their_node() -> None:
    before = os.sched_getaffinity(0)
    others = set(os.listdir("/proc/self/task"))
    nodes = [_core.NodeShare([0], CPUS[:1], 1), _core.NodeShare([0], CPUS[:1], 1)]
    pool = _core.ThreadPool(3, nodes=nodes)
    np.testing.assert_array_equal(product(pool), product(_core.ThreadPool(1)))
    assert os.sched_getaffinity(0) == before  # the caller is back where it was
    until = time.monotonic() + 10
    while n_pinned(others) < 2 and time.monotonic() < until:
        time.sleep(0.01)
    assert n_pinned(others) == 2


def test_callers_wait_for_each_other() -> None:
    pool = _core.ThreadPool(3)
    want = product(pool)
    wrong: list[int] = []

    def call(index: int) -> None:
        for _ in range(25):
            if not np.array_equal(product(pool), want):
                wrong.append(index)

    callers = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
        assert not caller.is_alive()
    assert wrong == []


def test_gil_is_free_while_computing() -> None:
    """Another thread of Python counts on during one long product."""
    large = RNG.standard_normal((2048, 1024), dtype=np.float32)
    g = _core.Graph()
    x = g.input("x", "F32", [2048, 1024])
    g.output(g.matmul(x, g.weight("w", _core.Tensor(large, "F32", [2048, 1024]))))
    executor = _core.Executor(g, _core.Workspace([_core.CpuBackend(_core.ThreadPool(1))]))
    ticks: list[float] = []
    stop = threading.Event()

    def tick() -> None:
        while not stop.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.001)

    counter = threading.Thread(target=tick)
    counter.start()
    began = time.perf_counter()
    executor.run({"x": large})
    ended = time.perf_counter()
    stop.set()
    counter.join()
    assert sum(began < t < ended for t in ticks) >= (2 if ended - began > 0.02 else 0)


def in_a_process(source: str) -> str:
    """What a program prints, which has ended well within a minute."""
    done = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_threads_that_cannot_be_started() -> None:
    """Those that were started are ended again, and an exception says how many there were."""
    source = """
import resource
from mla_backend import _core
from mla_backend.errors import DeviceError
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
try:
    _core.ThreadPool(4096)
except DeviceError as error:
    print(error)
"""
    assert "of 4096 threads could be started" in in_a_process(source)


def test_more_chunks_than_one_ticket_counts() -> None:
    """2100^2 matrices are as many chunks, above the 2^22 of one section."""
    ones = np.ones((2100, 2100, 1, 1), np.float32)
    g = _core.Graph()
    x = g.input("x", "F32", list(ones.shape))
    g.output(g.matmul(x, g.weight("w", _core.Tensor(ones, "F32", list(ones.shape)))))
    executor = _core.Executor(g, _core.Workspace([_core.CpuBackend(_core.ThreadPool(2))]))
    executor.run({"x": ones})
    np.testing.assert_array_equal(executor.output(0), ones)


FORK = """
import os, threading
import numpy as np
from mla_backend import _core
ones = np.ones((512, 512), np.float32)
pool = _core.ThreadPool(3)
def product():
    g = _core.Graph()
    x = g.input("x", "F32", [512, 512])
    g.output(g.matmul(x, g.weight("w", _core.Tensor(ones, "F32", [512, 512]))))
    executor = _core.Executor(g, _core.Workspace([_core.CpuBackend(pool)]))
    executor.run({"x": ones})
    return executor.output(0).sum() == 512.0**3
stop = threading.Event()
def compute():
    while not stop.is_set():
        assert product()
busy = threading.Thread(target=compute)
busy.start()
"""
CHILDREN = """
for _ in range(5):
    child = os.fork()
    if child == 0:
        right = []
        callers = [threading.Thread(target=lambda: right.append(product())) for _ in range(4)]
        for caller in callers: caller.start()
        for caller in callers: caller.join()
        os._exit(0 if right == [True] * 4 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
stop.set()
busy.join()
print("done")
"""


def test_forks_while_another_thread_computes() -> None:
    """A child starts workers of its own, also where several of its threads come at once."""
    assert in_a_process(FORK + CHILDREN) == "done\n"
