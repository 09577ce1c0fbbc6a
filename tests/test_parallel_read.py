"""Runs of files read into memory by teams of threads, through the page cache and past it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from mla_backend import _core
from mla_backend.errors import DeviceError, ShapeError

N_BYTES = 20_000_003  # more than two pieces, and no whole number of blocks


@pytest.fixture(scope="module")
def content() -> bytes:
    return np.random.default_rng(5).bytes(N_BYTES)


@pytest.fixture
def file(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "numbers.bin"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("bypass", [False, True])
@pytest.mark.parametrize(
    ("begin", "end"), [(0, N_BYTES), (4096, 8192), (4095, 4097), (7, 9), (3, 3)]
)
def test_any_range(file: Path, content: bytes, begin: int, end: int, bypass: bool) -> None:
    memory = np.zeros(N_BYTES, np.uint8)
    team = _core.ReadTeam(threads=2)
    team.add(memory, 1, 0, begin, end - begin) if begin else team.add(memory, 0, 0, 0, end)
    ((n_bytes, seconds, _),) = _core.read_in_parallel([str(file)], [team], bypass_cache=bypass)
    assert n_bytes == end - begin
    assert seconds >= 0
    first = 1 if begin else 0
    assert memory[first : first + end - begin].tobytes() == content[begin:end]


@pytest.mark.parametrize("bypass", [False, True])
def test_teams_share_rows(file: Path, content: bytes, bypass: bool) -> None:
    # 5 experts of 7 rows of 1000 bytes, behind 33 others: two teams take 3 and 4 rows of each.
    rows = np.frombuffer(content, np.uint8)[33 : 33 + 35_000].reshape(5, 7, 1000)
    parts = [np.zeros((5, 3, 1000), np.uint8), np.zeros((5, 4, 1000), np.uint8)]
    teams = []
    for part, offset in zip(parts, (33, 33 + 3000), strict=True):
        team = _core.ReadTeam(_core.usable_cpus()[:1], 3)
        stride = part.shape[1] * 1000
        team.add(part, 0, 0, offset, stride, n_runs=5, file_stride=7000, out_stride=stride)
        teams.append(team)
    seen: list[list[int]] = []
    _core.read_in_parallel([str(file)], teams, bypass, seen.append)
    assert seen[-1] == [15_000, 20_000]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), rows)


def test_several_files(tmp_path: Path) -> None:
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        path.write_bytes(path.name.encode() * 10)
    memory = np.zeros(20, np.uint8)
    team = _core.ReadTeam()
    for i in range(2):
        team.add(memory, 10 * i, i, 0, 10)
    _core.read_in_parallel([str(path) for path in paths], [team])
    assert memory.tobytes() == b"a" * 10 + b"b" * 10


@pytest.mark.parametrize("bypass", [False, True])
def test_files_that_end_early(file: Path, bypass: bool) -> None:
    team = _core.ReadTeam()
    team.add(np.zeros(100, np.uint8), 0, 0, N_BYTES - 10, 100)
    with pytest.raises(DeviceError, match=r"numbers.bin: ends at byte 20000003, expected 90 more"):
        _core.read_in_parallel([str(file)], [team], bypass)


def test_runs_stay_inside(file: Path) -> None:
    memory = np.zeros(100, np.uint8)
    team = _core.ReadTeam()
    with pytest.raises(ShapeError, match="end at byte 101 of 100"):
        team.add(memory, 1, 0, 0, 100)
    with pytest.raises(ShapeError, match="end at byte 130 of 100"):
        team.add(memory, 0, 0, 0, 10, n_runs=4, out_stride=40)
    with pytest.raises(ShapeError, match="below 0"):
        team.add(memory, 0, 0, -1, 10)
    with pytest.raises((BufferError, ValueError), match=r"read-only|not writable"):
        team.add(np.frombuffer(b"1234", np.uint8), 0, 0, 0, 4)
    team.add(memory, 0, 1, 0, 10)
    with pytest.raises(ShapeError, match=r"runs of file 1 of 1$"):
        _core.read_in_parallel([str(file)], [team])


def test_what_progress_raises_stops_it(file: Path) -> None:
    team = _core.ReadTeam()
    team.add(np.zeros(N_BYTES, np.uint8), 0, 0, 0, N_BYTES)

    def stop(done: list[int]) -> None:
        raise KeyError(done[0] >= 0)

    with pytest.raises(KeyError):
        _core.read_in_parallel([str(file)], [team], progress=stop)
