"""A model as part of a process: signals, forks, files that change. Each test has its own one."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_models import small_model

PRELUDE = """
import os, signal, sys, threading, time
from mla_backend import Model
from mla_backend.errors import DeviceError, UsageError

PROMPT = list(range(40, 60))
path = sys.argv[1]

def load(**options):
    return Model.load(path, **({"n_ctx": 256, "threads": 3} | options))

def tokens(model, n=8):
    return model.generate(PROMPT, temperature=0.0, max_tokens=n, ignore_eos=True).tokens

def in_child(work):
    '''Exit status of a forked child that runs work(); 99 where it hangs.'''
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            status = work()
        except BaseException as error:
            print(type(error).__name__, error, file=sys.stderr, flush=True)
        finally:
            os._exit(status)
    until = time.monotonic() + 30
    while time.monotonic() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return 99
"""


def run(source: str, path: Path) -> subprocess.CompletedProcess[str]:
    """Python 3.12 warns of forks with threads: that is what is tested."""
    return subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", PRELUDE + source, str(path)],
        capture_output=True,
        text=True,
        timeout=90,
    )


def passes(source: str, path: Path) -> None:
    done = run(source, path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "passed", done.stdout + done.stderr


@pytest.fixture(scope="module")
def path() -> Path:
    return small_model("tiny-v2", "q8_0", n_layer=2)


# ---- forks ---------------------------------------------------------------------------------------


def test_forked_child_generates_the_same(path: Path) -> None:
    source = """
model = load()
want = tokens(model)
model.logits([1])
assert in_child(lambda: 0 if tokens(model) == want else 2) == 0
model.logits([1])
assert tokens(model) == want
session = model.session()
session.feed(PROMPT)
def grandchild():
    return 0 if session.fork().feed([1]).shape == (1, 1024) else 2
assert in_child(lambda: in_child(grandchild)) == 0
print("passed")
"""
    passes(source, path)


def test_forked_while_another_thread_generates(path: Path) -> None:
    """The other thread is not in the child, and with it the one who would free the model."""
    source = """
model = load(n_ctx=8192)
started, stop = threading.Event(), threading.Event()
def generate():
    for _ in model.stream(PROMPT, ignore_eos=True):
        started.set()
        if stop.is_set():
            break
thread = threading.Thread(target=generate)
thread.start()
started.wait()
def child():
    for call in (lambda: tokens(model), lambda: model.logits(PROMPT), model.close):
        try:
            call()
        except DeviceError as error:
            assert "forked while another thread" in str(error)
        else:
            return 2
    # A session waits for the pass that may have been going on, which is over or never ends.
    try:
        session.feed(PROMPT)
    except DeviceError:
        pass
    return 0
session = model.session(n_ctx=64)
for _ in range(5):
    assert in_child(child) == 0
stop.set()
thread.join()
assert len(tokens(model)) == 8
print("passed")
"""
    passes(source, path)


def test_forked_with_an_open_stream(path: Path) -> None:
    source = """
model = load()
want = tokens(model)
stream = model.stream(PROMPT, temperature=0.0, max_tokens=8, ignore_eos=True)
first = next(stream).token
def child():
    try:
        tokens(model)
    except UsageError:
        rest = tuple(chunk.token for chunk in stream)
        return 0 if (first, *rest) == want else 2
    return 3
assert in_child(child) == 0
assert (first, *(chunk.token for chunk in stream)) == want
print("passed")
"""
    passes(source, path)


def test_child_leaves_the_cache_file_alone(path: Path) -> None:
    source = """
model = load(kv_file=path + ".cache")
want = tokens(model)
def child():
    try:
        model.generate([1, 2, 3], max_tokens=2)
    except DeviceError as error:
        return 0 if "file of the parent" in str(error) else 2
    return 3
assert in_child(child) == 0
assert tokens(model) == want
print("passed")
"""
    passes(source, path)


# ---- signals -------------------------------------------------------------------------------------


def test_interrupt_arrives_within_a_layer() -> None:
    """One chunk of 4000 tokens takes seconds; Ctrl-C does not wait for it."""
    path = small_model("tiny-v2", "q8_0")
    source = """
model = load(n_ctx=4096, n_batch=4096, threads=1, attention="absorbed")
session = model.session()
session.feed(PROMPT)
print("ready", flush=True)
try:
    started = time.monotonic()
    session.feed([5] * 4000)
except KeyboardInterrupt:
    print(time.monotonic())
    assert session.tokens == PROMPT
    assert session.feed([5]).shape == (1, 1024)
    print("passed")
else:
    print("no interrupt in", time.monotonic() - started)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", PRELUDE + source, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.4)
    sent = time.monotonic()
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=90)
    lines = out.split()
    assert lines[-1] == "passed", out
    assert float(lines[0]) - sent < 2.0


def test_interrupted_stream_keeps_what_it_has(path: Path) -> None:
    source = """
model = load(n_batch=16)
def progress(phase, done, total):
    if done == 64:
        os.kill(os.getpid(), signal.SIGINT)
prompt = [5] * 200
try:
    model.generate(prompt, on_progress=progress, max_tokens=2)
except KeyboardInterrupt:
    pass
else:
    raise AssertionError("no interrupt")
reused = model.generate(prompt, max_tokens=2).stats.n_reused
assert 64 <= reused < 199 and reused % 16 == 0, reused
print("passed")
"""
    passes(source, path)


def test_handler_that_uses_the_model_is_an_error(path: Path) -> None:
    source = """
model = load(n_ctx=4096, n_batch=4096, threads=1, attention="absorbed")
session, other = model.session(), model.session()
seen = []
def handler(*_):
    try:
        other.feed([1])
    except UsageError as error:
        seen.append(str(error))
signal.signal(signal.SIGALRM, handler)
signal.setitimer(signal.ITIMER_REAL, 0.1)
session.feed([5] * 2000)
assert len(seen) == 1 and "signal handler" in seen[0], seen
print("passed")
"""
    passes(source, path)


# ---- files ---------------------------------------------------------------------------------------


def test_file_that_shrinks_is_an_error(path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model.gguf"
    shutil.copy(path, copy)
    source = """
model = load()
want = tokens(model)
session = model.session()
session.feed(PROMPT)
stream = model.stream([7, 8, 9], ignore_eos=True)
next(stream)
os.truncate(path, os.stat(path).st_size // 2)
for call in (lambda: next(stream), lambda: session.feed([1]), lambda: tokens(model)):
    try:
        call()
    except DeviceError as error:
        assert "the file shrank" in str(error)
    else:
        raise AssertionError("no error")
assert session.tokens == PROMPT
print("passed")
"""
    passes(source, copy)


def test_file_that_is_replaced_does_not_matter(path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model.gguf"
    shutil.copy(path, copy)
    source = """
model = load()
want = tokens(model)
os.rename(path, path + ".old")
open(path, "wb").close()
model.logits([1])
assert tokens(model) == want
print("passed")
"""
    passes(source, copy)


def test_read_weights_need_no_file(path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model.gguf"
    shutil.copy(path, copy)
    source = """
model = load(mmap=False)
want = tokens(model)
os.truncate(path, 0)
model.logits([1])
assert tokens(model) == want
print("passed")
"""
    passes(source, copy)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_missing_permission_is_named(path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model.gguf"
    shutil.copy(path, copy)
    copy.chmod(0)
    done = run("load()", copy)
    assert "Permission denied" in done.stderr
