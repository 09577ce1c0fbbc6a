"""``run``: the answer and nothing else on stdout."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cli.conftest import Cli
from cli.fake import FakeModel, load_of
from mla_backend import Model
from mla_backend.errors import ContextError

Process = Callable[..., subprocess.CompletedProcess[bytes]]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeModel:
    model = FakeModel(["Once ", "upon ", "ä time"])
    monkeypatch.setattr(Model, "load", load_of(model))
    return model


def test_streams(cli: Cli, fake: FakeModel) -> None:
    result = cli("run", "a.gguf", "-p", "x")
    assert result.status == 0
    assert result.out == "Once upon ä time"
    notes = result.err.splitlines()
    assert notes[0] == "note: a note about the model"
    expected = "prompt: 7 tokens (2 reused), 10.0 tokens/s; answer: 3 tokens, 8.00 tokens/s (stop)"
    assert notes[1] == expected


def test_quiet(cli: Cli, fake: FakeModel) -> None:
    result = cli("run", "a.gguf", "-p", "x", "-q", "-v")
    assert (result.out, result.err) == ("Once upon ä time", "")


def test_verbose(cli: Cli, fake: FakeModel) -> None:
    result = cli("run", "-m", "a.gguf", "-p", "x", "--verbose")
    assert "(4 bytes each), workspace 5 bytes" in result.err
    assert "instruction set: baseline" in result.err


def test_json(cli: Cli, fake: FakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mla_backend.commands.run.model_facts", lambda *_: {"path": "a.gguf"})
    monkeypatch.setattr("mla_backend.commands.run.asdict", vars)
    result = cli("run", "a.gguf", "-p", "x", "--json", "--logprobs", "1")
    found = json.loads(result.out)
    assert found["text"] == "Once upon ä time"
    assert found["tokens"] == [0, 1, 2]
    assert found["finish_reason"] == "stop"
    assert found["stats"]["generation_tps"] == 8.0
    assert found["logprobs"][1]["top"] == [{"token": 1, "logprob": -0.5}]
    assert found["model"] == {"path": "a.gguf"}
    assert "stop" not in result.err


def test_sampling_options_arrive(cli: Cli, fake: FakeModel) -> None:
    cli(
        *["run", "a.gguf", "-p", "x", "-n", "9", "--temp", "0", "--top-k", "3", "--top-p", "0.5"],
        *["--min-p", "0.1", "--repeat-penalty", "1.5", "--repeat-last-n", "-1", "-s", "11"],
        *["--stop", "a", "--stop", "b", "--logprobs", "2"],
    )
    options = fake.options[0]
    options.pop("on_progress")
    assert options == {
        "max_tokens": 9,
        "stop": ("a", "b"),
        "temperature": 0.0,
        "top_k": 3,
        "top_p": 0.5,
        "min_p": 0.1,
        "repeat_penalty": 1.5,
        "repeat_last_n": -1,
        "seed": 11,
        "logprobs": 2,
    }


def test_model_options_arrive(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, object] = {}

    def load(path: Path, **options: object) -> FakeModel:
        seen.update(options, path=path)
        return FakeModel(["x"])

    monkeypatch.setattr(Model, "load", load)
    cli(
        *["run", "a.gguf", "-p", "x", "-c", "64", "-t", "3", "-ctk", "q8_0", "-b", "32"],
        *["--no-mmap", "--mlock", "--precision", "exact", "--attention", "expanded"],
        *["--isa", "avx2", "--kv-file", "kv", "--device", "cpu", "-ngl", "3", "--cpu-moe"],
        *["-ot", "a=b=cpu", "-ts", "3,1", "--numa", "shard", "--numa-nodes", "0-3"],
        "--no-tuned",
    )
    seen.pop("on_progress")
    assert seen == {
        "path": Path("a.gguf"),
        "n_ctx": 64,
        "threads": 3,
        "cache_type": "q8_0",
        "n_batch": 32,
        "mmap": False,
        "mlock": True,
        "precision": "exact",
        "attention": "expanded",
        "isa": "avx2",
        "kv_file": Path("kv"),
        "device": "cpu",
        "gpu_layers": 3,
        "cpu_moe": True,
        "override_tensor": [("a=b", "cpu")],
        "tensor_split": [3.0, 1.0],
        "numa": "shard",
        "numa_nodes": "0-3",
        "tuned": False,
    }


def test_bos(cli: Cli, fake: FakeModel) -> None:
    fake.scripts.append(["x"])
    cli("run", "a.gguf", "-p", "four")
    cli("run", "a.gguf", "-p", "four", "--no-bos")
    assert [len(ids) for ids in fake.asked] == [5, 4]


def test_prompt_file_loses_one_line_feed(cli: Cli, fake: FakeModel, tmp_path: Path) -> None:
    path = tmp_path / "prompt.txt"
    path.write_text("ab\n\n")
    cli("run", "a.gguf", "-f", path, "--no-bos")
    assert len(fake.asked[0]) == 3


def test_interrupt_closes_the_stream(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    model = FakeModel(["Once ", KeyboardInterrupt()])
    monkeypatch.setattr(Model, "load", load_of(model))
    result = cli("run", "a.gguf", "-p", "x", "-q")
    assert (result.status, result.out, result.err) == (130, "Once ", "")
    assert model.closed_streams == 1


def test_errors_keep_what_was_said(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    model = FakeModel(["Once ", ContextError("the prompt of 9 tokens exceeds the context of 8")])
    monkeypatch.setattr(Model, "load", load_of(model))
    result = cli("run", "a.gguf", "-p", "x", "-q")
    assert (result.status, result.out) == (1, "Once ")
    assert result.err == "error: the prompt of 9 tokens exceeds the context of 8\n"


# ---- with a real, random model ---------------------------------------------------------------


def test_real_model(cli: Cli, tiny: Path) -> None:
    arguments = ("run", tiny, "-p", "Hello", "-n", 8, "-s", 7, "-c", 128)
    first, second = cli(*arguments), cli(*arguments)
    assert first.status == 0
    assert first.out
    assert first.out == second.out
    assert "answer: " in first.err
    found = json.loads(cli(*arguments, "--json").out)
    assert found["text"] == first.out
    assert found["model"]["n_ctx"] == 128
    assert found["memory"]["cache_bytes"] == 128 * found["memory"]["cache_bytes_per_position"]


def test_prompt_too_long(cli: Cli, tiny: Path) -> None:
    result = cli("run", tiny, "-p", "word " * 200, "-c", 64, "-q")
    assert result.status == 1
    assert result.out == ""
    assert "exceeds the context of 64" in result.err


def test_session_is_reused(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.session"
    arguments = ("run", tiny, "-p", "one two three", "-n", 4, "--temp", 0, "-c", 128)
    # Rounded activations would differ: the second run computes one token, the first one all.
    arguments += ("-ctk", "f32", "--precision", "exact")
    plain = cli(*arguments)
    first = cli(*arguments, "--session", path)
    second = cli(*arguments, "--session", path)
    assert plain.out == first.out == second.out
    assert "reused" not in first.err
    assert "reused" in second.err
    other = cli(*arguments, "--session", path, "-ctk", "f16")
    assert other.status == 1
    assert "cache type" in other.err


def test_stdin_and_output_encoding(
    process: Process, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LC_ALL", "C")
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    done = process(
        "run", tiny, "-p", "-", "-n", "24", "-s", "1", "-c", "128", stdin=b"Gr\xc3\xbc\n"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode("utf-8")  # valid, whatever the locale says


def test_closed_pipe_is_quiet(tiny: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "mla_backend", "run", tiny, "-p", "x", "-n", "9", "-q"],
            stdout=write,
            stderr=subprocess.PIPE,
            timeout=120,
            check=False,
        )
    finally:
        os.close(write)
    assert done.returncode == 1
    assert done.stderr == b""


def test_ctrl_c_keeps_the_session(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.session"
    arguments = ["run", tiny, "-p", "x", "--temp", "2", "--top-k", "0", "--min-p", "0"]
    arguments += ["--top-p", "1", "-c", "8192", "--session", path]
    command = [sys.executable, "-m", "mla_backend", *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        assert running.stdout is not None
        running.stdout.read(10)
        running.send_signal(signal.SIGINT)
        running.communicate(timeout=60)
    assert running.returncode in (130, 0)
    again = cli(*arguments, "-n", 1)
    assert again.status == 0
    assert "reused" in again.err


def test_ctrl_c(tiny: Path) -> None:
    command = [sys.executable, "-m", "mla_backend", "run", tiny, "-p", "x", "--temp", "2"]
    command += ["--top-k", "0", "--min-p", "0", "--top-p", "1", "-c", "8192"]
    with subprocess.Popen(
        [str(item) for item in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as running:
        assert running.stdout is not None
        running.stdout.read(10)  # it has begun to answer
        running.send_signal(signal.SIGINT)
        started = time.monotonic()
        _, err = running.communicate(timeout=60)
        assert time.monotonic() - started < 10
    assert running.returncode in (130, 0)  # 0: this time the model ended first
    assert b"Traceback" not in err
