"""Interruptions: killed, cancelled, a full disk, a failing disk. The file comes out the same."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from convert.checkpoints import checkpoint
from mla_backend.convert import from_hf, output, pieces, safetensors
from mla_backend.convert.from_hf import ConvertOptions, convert
from mla_backend.convert.journal import Journal
from mla_backend.errors import ModelError, UsageError

OPTIONS = ConvertOptions(outtype="q4_k_m", threads=2)

#: A conversion in many small pieces, each of which takes a while, recorded at once.
SLOW = """
import sys, time
from mla_backend.convert import from_hf, output, pieces
pieces.PIECE_ELEMS = 8192
output._JOURNAL_INTERVAL_S = 0.03
make = from_hf.make
def slow(recipe, piece):
    time.sleep(0.02)
    return make(recipe, piece)
from_hf.make = slow
options = from_hf.ConvertOptions(outtype="q4_k_m", threads=2, max_shard_bytes=eval(sys.argv[3]))
from_hf.convert(sys.argv[1], sys.argv[2], options)
"""


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    return checkpoint(fp8=True, n_nextn=1).write(tmp_path / "hf")


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE_ELEMS", 8192)


def kill_after(n_lines: int, arguments: list[str], journal: Path) -> None:
    """Start a conversion and kill it when the journal has so many lines."""
    process = subprocess.Popen([sys.executable, "-c", SLOW, *arguments])
    try:
        for _ in range(3000):
            if journal.exists() and journal.read_bytes().count(b"\n") >= n_lines:
                break
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("n_lines", [2, 8, 20])
def test_killed_and_resumed(tmp_path: Path, hf: Path, n_lines: int) -> None:
    reference, out = tmp_path / "reference.gguf", tmp_path / "o.gguf"
    convert(hf, reference, OPTIONS)
    journal = tmp_path / ".o.gguf.journal"
    kill_after(n_lines, [str(hf), str(out), "None"], journal)
    assert not out.exists()
    reports: list[int] = []
    convert(hf, out, OPTIONS, on_progress=lambda phase, done, total: reports.append(done))
    assert 0 < reports[0] < reports[-1]
    assert out.read_bytes() == reference.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "o.gguf", "reference.gguf"]


@pytest.mark.usefixtures("small_pieces")
def test_killed_shards_are_resumed(tmp_path: Path, hf: Path) -> None:
    size = 100_000
    options = ConvertOptions(outtype="q4_k_m", threads=2, max_shard_bytes=size)
    reference = convert(hf, tmp_path / "reference.gguf", options).output.paths
    kill_after(6, [str(hf), str(tmp_path / "o.gguf"), str(size)], tmp_path / ".o.gguf.journal")
    assert not list(tmp_path.glob("o-*"))
    plan = convert(hf, tmp_path / "o.gguf", options)
    assert [p.read_bytes() for p in plan.output.paths] == [p.read_bytes() for p in reference]
    assert not list(tmp_path.glob(".*"))


def interrupted(
    hf: Path, out: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, after: int = 30
) -> None:
    """A conversion in which making a piece fails once."""
    make, count = from_hf.make, 0

    def failing(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count == after:
            raise error
        return make(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(from_hf, "make", failing)
        with pytest.raises(type(error)):
            convert(hf, out, OPTIONS)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("error", [OSError(errno.EIO, "bad", "f"), KeyboardInterrupt()])
def test_failures_that_may_pass_keep_what_is_done(
    tmp_path: Path, hf: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    out = tmp_path / "o.gguf"
    interrupted(hf, out, monkeypatch, error)
    assert not out.exists()
    assert (tmp_path / ".o.gguf.part").exists()
    reports: list[int] = []
    convert(hf, out, OPTIONS, on_progress=lambda phase, done, total: reports.append(done))
    assert reports[0] > 0
    reference = tmp_path / "reference.gguf"
    convert(hf, reference, OPTIONS)
    assert out.read_bytes() == reference.read_bytes()


@pytest.mark.usefixtures("small_pieces")
def test_failures_that_stay_keep_nothing(
    tmp_path: Path, hf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(hf, tmp_path / "o.gguf", monkeypatch, ModelError("bad numbers"))
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("change", ["options", "checkpoint", "journal", "partial"])
def test_other_work_begins_anew(
    tmp_path: Path, hf: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    out = tmp_path / "o.gguf"
    interrupted(hf, out, monkeypatch, KeyboardInterrupt())
    options = OPTIONS
    if change == "options":
        options = ConvertOptions(outtype="q8_0")
    elif change == "checkpoint":
        os.utime(next(hf.glob("*.safetensors")), ns=(1, 1))
    elif change == "journal":
        (tmp_path / ".o.gguf.journal").write_bytes(b"\xff\n1 2 3\n")
    else:
        (tmp_path / ".o.gguf.part").unlink()
    reports: list[int] = []
    convert(hf, out, options, on_progress=lambda phase, done, total: reports.append(done))
    assert reports[0] == 0
    reference = tmp_path / "reference.gguf"
    convert(hf, reference, options)
    assert out.read_bytes() == reference.read_bytes()


def test_journal_ignores_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "j"
    with Journal(path, "work") as journal:
        journal.record([3, 1])
        journal.record([7])
    with path.open("ab") as file:
        file.write(b"12 1")
    with Journal(path, "work") as journal:
        assert journal.done == {1, 3, 7}
        journal.record([9])
    with Journal(path, "work") as journal:
        assert journal.done == {1, 3, 7, 9}
    with Journal(path, "other") as journal:
        assert journal.done == set()


def test_two_processes_on_one_file(tmp_path: Path, hf: Path) -> None:
    with Journal(tmp_path / ".o.gguf.journal", "x"), pytest.raises(UsageError, match="another"):
        convert(hf, tmp_path / "o.gguf", OPTIONS)


def test_full_disk_is_found_before_writing(
    tmp_path: Path, hf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space") as caught:
        convert(hf, tmp_path / "o.gguf", OPTIONS)
    assert caught.value.filename == str(tmp_path / "o.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_failing_reads_name_the_file(
    tmp_path: Path, hf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(handle: int, buffers: Any, position: int) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(safetensors.os, "preadv", fail)
    with pytest.raises(OSError, match="Input/output") as caught:
        convert(hf, tmp_path / "o.gguf", OPTIONS)
    assert str(caught.value.filename).endswith(".safetensors")
    assert not (tmp_path / "o.gguf").exists()


def test_files_that_shrink_are_an_error(tmp_path: Path, hf: Path) -> None:
    plan = from_hf.plan_conversion(hf, tmp_path / "o.gguf", OPTIONS)
    shard = next(hf.glob("*-00002-of-*"))
    os.truncate(shard, 5000)
    with pytest.raises(ModelError, match="shrank"):
        output.write_output(plan.output, plan.make, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
