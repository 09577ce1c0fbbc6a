"""The commands ``convert`` and ``upgrade``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from convert.checkpoints import checkpoint
from mla_backend.cli import main
from mla_backend.commands.sizes import parse_size
from mla_backend.errors import UsageError
from mla_backend.gguf import read_gguf
from small_models import small_model


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    return checkpoint(n_nextn=1).write(tmp_path / "hf")


def test_convert(tmp_path: Path, hf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "o.gguf"
    arguments = ["convert", str(hf), str(out), "--outtype", "q8_0", "--no-mtp", "--name", "X"]
    assert main(arguments) == 0
    said = capsys.readouterr()
    assert said.out == f"{out}\n"
    assert "prediction layer (MTP) is left out" in said.err
    assert read_gguf(out).metadata["general.name"] == "X"
    assert main(arguments) == 2
    assert "exists; --force replaces it" in capsys.readouterr().err
    assert main([*arguments, "--force", "-q"]) == 0
    assert capsys.readouterr().err == ""


def test_out_must_be_a_new_file_in_a_directory(
    tmp_path: Path, hf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(hf), str(tmp_path / "none" / "o.gguf")]) == 2
    assert "none is no directory" in capsys.readouterr().err
    assert main(["convert", str(hf), str(hf)]) == 2
    assert "hf is a directory" in capsys.readouterr().err


def test_json_and_shards(tmp_path: Path, hf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "o.gguf"
    assert main(["convert", str(hf), str(out), "--split-max-size", "1M", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["written"]
    assert said["type"] == "bf16"
    assert said["prediction_layers"] == 1
    assert len(said["paths"]) > 1
    assert sum(Path(path).stat().st_size for path in said["paths"]) == said["n_bytes"]


def test_dry_run(tmp_path: Path, hf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["convert", str(hf), str(tmp_path / "o.gguf"), "--outtype", "q4_k_m", "--dry-run"]
    assert main([*arguments, "-v"]) == 0
    said = capsys.readouterr().out
    assert "type q4_k_m" in said
    assert "blk.3.nextn.eh_proj.weight" in said
    assert "takes about" in said
    assert main([*arguments, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert not plan["written"]
    assert plan["seconds"] >= 0.001
    assert sum(row["tensors"] for row in plan["formats"].values()) > 40
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_problems_end_with_status_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "hf").mkdir()
    assert main(["convert", str(tmp_path / "hf"), str(tmp_path / "o.gguf")]) == 1
    assert "config.json: missing\n" in capsys.readouterr().err


def test_upgrade(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = small_model("tiny-v2", "q4_k_m", "legacy"), tmp_path / "n.gguf"
    assert main(["upgrade", str(old), str(new)]) == 0
    said = capsys.readouterr()
    assert said.out == f"{new}\n"
    assert "attn_v_b keeps their rows" in said.err
    assert "re-quantized from Q4_K to Q8_0" in said.err
    assert main(["upgrade", str(old), str(new), "--json", "--force", "--k-b-type", "f32"]) == 0
    said = capsys.readouterr()
    assert {change["to"] for change in json.loads(said.out)["requantized"]} == {"F32"}
    assert "decoded from Q4_K to F32" in said.err
    assert main(["upgrade", str(new), str(tmp_path / "m.gguf")]) == 1


def test_lossless_upgrade_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = small_model("tiny-v2", "f16", "legacy")
    assert main(["upgrade", str(old), str(tmp_path / "n.gguf")]) == 0
    assert "without a change to any number" in capsys.readouterr().err


def test_unfinished_work_is_announced(
    tmp_path: Path,
    hf: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from mla_backend.convert import from_hf

    out, make, count = tmp_path / "o.gguf", from_hf.make, 0

    def interrupt(*arguments: object) -> object:
        nonlocal count
        count += 1
        if count == 20:
            raise KeyboardInterrupt
        return make(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(from_hf, "make", interrupt)
        assert main(["convert", str(hf), str(out)]) == 130
    assert "the same command goes on from here" in capsys.readouterr().err
    assert main(["convert", str(hf), str(out)]) == 0
    assert "going on with the unfinished file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "n_bytes"), [("500M", 500_000_000), ("4G", 4_000_000_000), ("12", 12), ("1 kb", 1000)]
)
def test_sizes(text: str, n_bytes: int) -> None:
    assert parse_size(text, "-x") == n_bytes


@pytest.mark.parametrize("text", ["", "0", "G", "-1M", "1.5G", "4Q"])
def test_wrong_sizes(text: str) -> None:
    with pytest.raises(UsageError, match="-x: found"):
        parse_size(text, "-x")
