"""A short run of the GGUF fuzz target with every test run; the long one is a program of its own."""

from __future__ import annotations

import pytest
from mla_backend.config import config_from_gguf
from mla_backend.errors import ModelError
from mla_backend.gguf import read_gguf

from tests.fuzz import fuzz_gguf


def test_mutated_files() -> None:
    summary = fuzz_gguf.fuzz(400, seed=1)
    assert summary.failures == []
    assert summary.n_cases == 400


def test_originals_are_valid(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Otherwise the mutations would only ever test the first check."""
    path = tmp_path_factory.mktemp("seeds") / "seed.gguf"
    n_models = 0
    for data in fuzz_gguf.seeds():
        path.write_bytes(data)
        file = read_gguf(path)
        try:
            config_from_gguf(file)
            n_models += 1
        except ModelError:
            assert "general.architecture" not in file.metadata
    assert n_models == 4


def test_failures_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(_: object) -> None:
        while True:
            pass

    def wrong(_: object) -> None:
        raise KeyError("k")

    def greedy(_: object) -> None:
        bytearray(8 << 20)
        raise ModelError("x")

    monkeypatch.setattr(fuzz_gguf, "CASE_LIMIT_S", 0.05)
    for reader, expected in ((slow, "still running"), (wrong, "KeyError"), (greedy, "name the")):
        monkeypatch.setattr(fuzz_gguf, "read_gguf", reader)
        assert expected in fuzz_gguf.fuzz(1, seed=0).failures[0]
