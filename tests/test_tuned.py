"""The file of tuned settings, the number of threads, and how loading uses both."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mla_backend import _core, threads
from mla_backend.config import config_from_gguf
from mla_backend.gguf import read_gguf
from mla_backend.model import Model
from mla_backend.threads import ThreadChoice, choose_threads
from mla_backend.tuned import Tuned, TunedFile, machine_key, model_key, tuned_path
from mla_backend.weights import check

from tests.small_models import small_model

FOUND = Tuned(threads=1, n_batch=512, cache_type="q8_0", when="2026-11-23")


@pytest.fixture(autouse=True)
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the settings are kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuned_path() == tmp_path / "mla_backend" / "tuned.json"
    return tuned_path()


def key_of(path: Path) -> str:
    header = read_gguf(path)
    config = config_from_gguf(header)
    return model_key(config, check(config, header).values())


# ---- the file ------------------------------------------------------------------------------------


def test_what_is_stored_is_found(file: Path) -> None:
    here = TunedFile()
    assert here.find("m") is None
    here.store("m", FOUND)
    here.store("n", replace(FOUND, threads=None))
    here.store_threads(3)
    again = TunedFile()
    assert again.problem == ""
    assert again.find("m") == FOUND
    assert again.find("n") == replace(FOUND, threads=None)
    assert again.threads == 3
    assert TunedFile(machine="another").find("m") is None
    assert [path.name for path in file.parent.iterdir()] == ["tuned.json"]  # nothing half written


def test_two_machines_share_a_file(file: Path) -> None:
    one, other = TunedFile(machine="one"), TunedFile(machine="other")
    one.store("m", FOUND)
    other.store("m", replace(FOUND, n_batch=1024))
    assert TunedFile(machine="one").find("m") == FOUND


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        b'{"version": 2, "machines": {}}',
        b'{"version": 1, "machines": []}',
        b"[" * 100_000,
    ],
)
def test_a_damaged_file_is_one_note(file: Path, content: bytes) -> None:
    file.parent.mkdir()
    file.write_bytes(content)
    assert "is ignored" in TunedFile().problem
    with Model.load(small_model(), n_ctx=64) as model:
        assert sum("tuned.json is ignored" in note for note in model.notes) == 1
        assert model.n_threads == _core.usable_physical_cores()
    with Model.load(small_model(), n_ctx=64, tuned=False) as model:
        assert not any("tuned.json" in note for note in model.notes)
    TunedFile().store("m", FOUND)
    assert TunedFile().find("m") == FOUND


@pytest.mark.parametrize(
    "entry",
    [
        1,
        {},
        {"threads": 0},
        {"threads": True},
        {"threads": "2"},
        {"n_batch": -1},
        {"n_batch": None},
        {"n_batch": 1 << 40},
        {"cache_type": 1},
        {"when": None},
    ],
)
def test_entries_that_make_no_sense(file: Path, entry: Any) -> None:
    whole = {"threads": 2, "n_batch": 512, "cache_type": "f16", "when": "2026-11-23"}
    stored = {**whole, **entry} if isinstance(entry, dict) and entry else entry
    machines = {machine_key(): {"models": {"m": stored}, "threads": -1}}
    file.parent.mkdir()
    file.write_text(json.dumps({"version": 1, "machines": machines}))
    assert TunedFile().find("m") is None
    assert TunedFile().threads is None


def test_a_directory_in_its_place(file: Path) -> None:
    file.mkdir(parents=True)
    assert "is ignored" in TunedFile().problem
    with pytest.raises(IsADirectoryError):
        TunedFile().store("m", FOUND)


# ---- keys ----------------------------------------------------------------------------------------


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", nowhere)
    found = TunedFile(machine="this one")
    assert found.find("a model") is None
    assert "XDG_CACHE_HOME" in found.problem
    with pytest.raises(OSError, match="XDG_CACHE_HOME"):
        found.store_threads(2)


def test_a_model_is_known_by_its_shape_and_formats(tmp_path: Path) -> None:
    moved = tmp_path / "moved.gguf"
    moved.write_bytes(small_model().read_bytes())
    assert key_of(moved) == key_of(small_model())
    assert key_of(small_model(type="q8_0")) != key_of(small_model())
    assert key_of(small_model("tiny-v3")) != key_of(small_model())


# ---- loading -------------------------------------------------------------------------------------


def test_loading_uses_what_was_tuned() -> None:
    TunedFile().store(key_of(small_model()), FOUND)
    with Model.load(small_model(), n_ctx=2048) as model:
        assert (model.n_threads, model.n_batch) == (1, 512)
        assert model.defaults.text == "threads 1, batch 512: tuned on 2026-11-23"
        assert model.cache_type == "f16"
    with Model.load(small_model(), n_ctx=2048, threads=2, n_batch=100) as model:
        assert (model.n_threads, model.n_batch) == (2, 100)
    with Model.load(small_model(), n_ctx=2048, tuned=False) as model:
        assert (model.n_threads, model.n_batch) == (_core.usable_physical_cores(), 2048)
    with Model.load(small_model(type="q8_0"), n_ctx=2048) as model:
        assert model.n_batch == 2048


# ---- threads -------------------------------------------------------------------------------------


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """machine(cores, cpus, quota) stands for this one."""

    def pretend(cores: int, cpus: int, quota: float | None = None) -> None:
        monkeypatch.setattr(_core, "usable_physical_cores", lambda root="": cores)
        monkeypatch.setattr(_core, "usable_cpus", lambda: list(range(cpus)))
        monkeypatch.setattr(_core, "cpu_quota_cores", lambda root="": quota)

    return pretend


def fail(n_threads: int) -> float:
    raise AssertionError("nothing is to be probed")


def test_cores_without_a_choice(machine: Any) -> None:
    machine(4, 4)
    assert choose_threads(TunedFile(), fail) == ThreadChoice(4, "one per physical core")
    machine(3, 8, quota=2.5)
    assert choose_threads(TunedFile(), fail).n_threads == 3
    assert "2.5 cores" in choose_threads(TunedFile(), fail).reason
    machine(4, 8)
    assert choose_threads(None, fail) == ThreadChoice(4, "one per physical core")


@pytest.mark.parametrize(("gain", "chosen"), [(1.2, 8), (1.01, 4), (0.7, 4)])
def test_a_probe_decides_about_hardware_threads(machine: Any, gain: float, chosen: int) -> None:
    machine(4, 8)
    rates = {4: 100.0, 8: 100.0 * gain}
    assert choose_threads(TunedFile(), rates.__getitem__).n_threads == chosen
    assert choose_threads(TunedFile(), fail).n_threads == chosen  # it is remembered


def test_a_probe_that_cannot_be_kept(machine: Any, file: Path) -> None:
    file.mkdir(parents=True)
    machine(4, 8)
    choice = choose_threads(TunedFile(), lambda n: float(n))
    assert choice.n_threads == 8
    assert "could not be stored" in choice.reason


def test_the_probe_measures() -> None:
    assert threads._rate(1) > 0
