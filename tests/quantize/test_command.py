"""The command line of ``quantize``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from mla_backend.cli import main
from mla_backend.gguf import read_gguf
from quantize.models import model

Capture = pytest.CaptureFixture[str]


def run(capfd: Capture, *arguments: object) -> tuple[int, str, str]:
    status = main(["quantize", *(str(argument) for argument in arguments)])
    captured = capfd.readouterr()
    return status, captured.out, captured.err


def test_writes_a_file(tmp_path: Path, capfd: Capture) -> None:
    out = tmp_path / "o.gguf"
    status, said, _ = run(capfd, model("tied"), out, "Q4_K_M", "--tensor-type", "attn_q_a=q8_0")
    assert (status, said) == (0, f"{out}\n")
    formats = {name: info.format for name, info in read_gguf(out).tensors.items()}
    assert formats["blk.0.attn_q_a.weight"] == "Q8_0"
    assert formats["token_embd.weight"] == "Q6_K"  # it is the output projection too


def test_dry_run(tmp_path: Path, capfd: Capture) -> None:
    out = tmp_path / "o.gguf"
    status, said, warned = run(capfd, model("tied"), out, "q3_k_m", "--dry-run", "-v")
    assert status == 0
    assert "type q3_k_m" in said
    assert "bits per weight" in said
    assert "BF16 -> Q3_K" in said
    assert "threads" in said
    assert "Q3_K: numbers lose much without importance" in warned
    assert not list(tmp_path.iterdir())


def test_json(tmp_path: Path, capfd: Capture) -> None:
    out = tmp_path / "o.gguf"
    status, said, _ = run(capfd, model("tied"), out, "q8_0", "--json", "--dry-run")
    planned = json.loads(said)
    assert (status, planned["written"]) == (0, False)
    assert planned["seconds"] >= 0
    _, said, _ = run(capfd, model("tied"), out, "q8_0", "--json")
    written = json.loads(said)
    assert written["written"]
    assert written["n_bytes"] == planned["n_bytes"] == out.stat().st_size
    assert written["formats"]["Q8_0"]["tensors"] > 10
    assert 8.5 <= written["bits_per_weight"] < 9


def test_a_file_is_replaced_on_demand(tmp_path: Path, capfd: Capture) -> None:
    out = tmp_path / "o.gguf"
    out.write_text("mine")
    status, _, said = run(capfd, model("tied"), out, "q8_0")
    assert status == 2
    assert "--force replaces it" in said
    assert out.read_text() == "mine"
    assert run(capfd, model("tied"), out, "q8_0", "--force")[0] == 0
    assert read_gguf(out).tensors


def test_what_is_quantized_needs_permission(tmp_path: Path, capfd: Capture) -> None:
    once, twice = tmp_path / "once.gguf", tmp_path / "twice.gguf"
    run(capfd, model("tied"), once, "q8_0")
    status, _, said = run(capfd, once, twice, "q4_k_m")
    assert status == 2
    assert "--allow-requantize" in said
    assert run(capfd, once, twice, "q4_k_m", "--allow-requantize")[0] == 0


def test_devices_are_not_replaced(capfd: Capture) -> None:
    status, _, said = run(capfd, model("tied"), "/dev/null", "q8_0", "--force")
    assert status == 2
    assert "no ordinary file" in said
