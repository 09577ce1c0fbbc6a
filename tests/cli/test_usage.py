"""What is wrong with a command line, and how it is said: status 2 or 1, one clear line."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from cli.conftest import Cli
from mla_backend.commands.options import SamplingOptions
from mla_backend.sampling import SamplingParams

# Arguments, what the message has to say.
USAGE_ERRORS = [
    ([], "Missing command"),
    (["frob"], "frob"),
    (["run"], "no prompt"),
    (["run", "a.gguf", "-m", "b.gguf", "-p", "x"], "named twice, 'a.gguf' and -m 'b.gguf'"),
    (["chat"], "no model is named"),
    (["inspect"], "no model is named"),
    (["run", "a.gguf"], "no prompt"),
    (["run", "a.gguf", "-p", ""], "the prompt is empty"),
    (["run", "a.gguf", "-p", "x", "-f", "y"], "accepted: one of them"),
    (["run", "a.gguf", "-p", "x\udcff"], "character 1 is not valid UTF-8"),
    (["run", "a.gguf", "-p"], "requires an argument"),
    (["run", "a.gguf", "-p", "x", "--frob"], "--frob"),
    (["run", "a.gguf", "-p", "x", "-c", "-1"], "--ctx-size"),
    (["run", "a.gguf", "-p", "x", "-t", "0"], "--threads"),
    (["run", "a.gguf", "-p", "x", "-b", "0"], "--batch-size"),
    (["run", "a.gguf", "-p", "x", "-n", "few"], "--predict"),
    (["run", "a.gguf", "-p", "x", "--temp", "-1"], "--temp"),
    (["run", "a.gguf", "-p", "x", "--top-p", "1.5"], "--top-p"),
    (["run", "a.gguf", "-p", "x", "-ctk", "q4_0"], "q8_0"),
    (["run", "a.gguf", "-p", "x", "--precision", "most"], "exact"),
    (["run", "a.gguf", "-p", "x", "--attention", "none"], "absorbed"),
    (["run", "a.gguf", "-p", "x", "--device", "gpu"], "device 'gpu'"),
    (["run", "a.gguf", "-p", "x", "--session", "no/such/place"], "there is no directory"),
    (["synth", "tiny"], "OUT"),
    (["synth", "v9", "out.gguf"], "tiny-v2"),
    (["synth", "--shape", "v9", "out.gguf"], "tiny-v2"),
    (["synth", "--shape", "tiny-v2", "tiny-v3", "out.gguf"], "--shape SHAPE OUT"),
    (["synth", "--shape", "tiny-v2"], "OUT"),
]


@pytest.mark.parametrize(("arguments", "message"), USAGE_ERRORS)
def test_usage_errors(cli: Cli, arguments: list[str], message: str) -> None:
    result = cli(*arguments)
    assert result.status == 2
    assert result.out == ""
    assert message in result.err
    assert result.err.startswith("error: ")
    command = f" {arguments[0]}" if arguments and arguments[0] != "frob" else ""
    assert result.err.endswith(f"Try 'mla-backend{command} --help'.\n")


def test_missing_model_file(cli: Cli) -> None:
    for command in (
        ["run", "none.gguf", "-p", "x"],
        ["chat", "none.gguf"],
        ["inspect", "none.gguf"],
    ):
        result = cli(*command)
        assert result.status == 1
        assert result.err == "error: none.gguf: no such file\n"


def test_no_model_file(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "text.gguf"
    path.write_text("this is no model at all, but it is long enough for a header")
    result = cli("inspect", path)
    assert result.status == 1
    assert str(path) in result.err
    assert "Traceback" not in result.err


def test_prompt_file_errors(cli: Cli, tmp_path: Path) -> None:
    result = cli("run", "a.gguf", "-f", tmp_path / "none.txt")
    assert result.status == 1
    assert result.err == f"error: {tmp_path / 'none.txt'}: No such file or directory\n"
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"abc\xe4def")
    result = cli("run", "a.gguf", "-f", bad)
    assert result.status == 2
    assert f"{bad}: byte 3 (0xe4) is not valid UTF-8" in result.err
    (tmp_path / "empty.txt").write_text("\n")
    assert "the prompt is empty" in cli("run", "a.gguf", "-f", tmp_path / "empty.txt").err


def test_debug_shows_the_place(cli: Cli) -> None:
    result = cli("run", "none.gguf", "-p", "x", "--debug")
    assert result.status == 1
    assert "Traceback" in result.err
    assert result.err.endswith("error: none.gguf: no such file\n")


def test_unforeseen_errors_take_one_line(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyError("surprise")

    monkeypatch.setattr("mla_backend.inspection.inspect_model", fail)
    result = cli("inspect", "a.gguf")
    assert result.status == 1
    assert result.err == "error: KeyError: 'surprise' (--debug shows where)\n"


@pytest.mark.parametrize("error", [KeyboardInterrupt()])
def test_interrupt_is_130(cli: Cli, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("mla_backend.inspection.inspect_model", fail)
    result = cli("inspect", "a.gguf")
    assert (result.status, result.err) == (130, "")


@pytest.mark.parametrize(
    "arguments", [["--help"], ["run", "--help"], ["chat", "-h"], ["synth", "-h"]]
)
def test_help(cli: Cli, arguments: list[str]) -> None:
    result = cli(*arguments)
    assert result.status == 0
    assert "mla-backend" in result.out
    assert result.err == ""


def test_start_is_light() -> None:
    """Help and usage errors wait for no library that only a model needs."""
    heavy = ("numpy", "tokenizers", "jinja2", "msgspec", "ml_dtypes", "mla_backend._core")
    code = (
        "import sys; from mla_backend.cli import main; main(['--help']); main(['run']);"
        f"print('HEAVY', *(name for name in {heavy} if name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1].strip() == "HEAVY"


def test_sampling_defaults_are_the_samplers() -> None:
    arguments = SamplingOptions().arguments()
    defaults = SamplingParams()
    for field in fields(SamplingParams):
        if field.name in arguments:
            assert arguments[field.name] == getattr(defaults, field.name), field.name


def test_same_program_both_ways() -> None:
    """The installed command and ``python -m`` call the same function."""
    import mla_backend.__main__
    import mla_backend.cli

    assert mla_backend.__main__.main is mla_backend.cli.main


def test_version(cli: Cli) -> None:
    result = cli("version")
    assert result.status == 0
    assert result.out.startswith("mla_backend ")
    assert '"isas": [' in cli("version", "--json").out
