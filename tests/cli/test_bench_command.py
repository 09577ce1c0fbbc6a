"""``bench`` and ``Model.bench``: what is measured and how it is shown, never how fast it was."""

from __future__ import annotations

import csv
import io
import json
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from cli.conftest import Cli
from mla_backend import Model
from mla_backend.benchmark import BenchResult, Measurement
from mla_backend.errors import ContextError, UsageError

COLUMNS = [field.name for field in fields(Measurement)]
QUICK = ("-t", "1", "-r", "1", "--device", "cpu")

#: Stands in for llama.cpp: what the driven side asks of it, and nothing else.
FAKE_LLAMA_CPP = """
__version__ = "9.9"
print("chatter on the standard output")

class Llama:
    def __init__(self, **options):
        assert options["kv_overrides"] is None  # the model has a query latent
        assert options["n_threads"] == 1 and options["n_gpu_layers"] == 0
        self.n_tokens = 0

        self.ctx = object()

    def eval(self, ids):
        self.n_tokens += len(ids)

def llama_synchronize(ctx):
    assert ctx is not None
"""


@pytest.fixture
def fake_peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module ``llama_cpp`` that other interpreters find."""
    place = tmp_path / "peer"
    place.mkdir()
    (place / "llama_cpp.py").write_text(FAKE_LLAMA_CPP)
    monkeypatch.setenv("PYTHONPATH", str(place))
    return place / "llama_cpp.py"


def test_table(cli: Cli, tiny: Path) -> None:
    result = cli("bench", tiny, "-p", "8,20", "-n", "3", "-d", "0,16", *QUICK)
    assert result.status == 0, result.err
    first, second, *rest = result.out.splitlines()
    assert "on cpu" in first
    assert "threads 1" in first
    assert "GB/s" in second
    assert "TOPS" in second
    rows = [line.split("|")[1:-1] for line in rest if line.startswith("|")]
    names = [cell.strip() for cell in rows[0]]
    assert names[:7] == [
        "phase",
        "depth",
        "tokens",
        "program",
        "attention",
        "tokens/s",
        "spread",
    ]
    assert "ratio" not in names
    found = [tuple(cell.strip() for cell in row[:4]) for row in rows[2:]]
    assert found == [
        (phase, depth, tokens, "mla_backend")
        for depth in ("0", "16")
        for phase, tokens in (("prefill", "8"), ("prefill", "20"), ("decode", "3"))
    ]


def test_json(cli: Cli, tiny: Path) -> None:
    result = cli("bench", tiny, "-p", "8", "-n", "2", "-d", "4", "-o", "json", *QUICK)
    assert result.status == 0, result.err
    found = json.loads(result.out)
    about = {"model", "devices", "limits", "energy", "load_average", "repeats", "notes"}
    assert set(found) == {"results", *about}
    assert found["devices"] == ["cpu"]
    assert found["model"]["n_threads"] == 1
    assert found["limits"]["read_gbps"] > 0
    prefill, decode = found["results"]
    assert list(prefill) == COLUMNS
    assert (prefill["phase"], prefill["n_tokens"], prefill["depth"]) == ("prefill", 8, 4)
    assert (decode["phase"], decode["n_tokens"], decode["depth"]) == ("decode", 2, 4)
    assert decode["attention"] == "absorbed"
    for row in found["results"]:
        assert row["mode"] == "auto"
        assert row["ratio"] == 1.0
        for name in ("tps", "read_gbps", "tops", "read_share", "tops_share", "roofline_share"):
            assert row[name] > 0, name
        assert (row["joules_per_token"] is None) == (not found["energy"])


def test_csv(cli: Cli, tiny: Path) -> None:
    result = cli("bench", tiny, "-p", "0", "-n", "2", "-o", "csv", *QUICK)
    assert result.status == 0, result.err
    (row,) = csv.DictReader(io.StringIO(result.out))
    assert list(row) == COLUMNS
    assert row["phase"] == "decode"
    assert float(row["tps"]) > 0


def test_sweep_has_all_modes(cli: Cli, tiny: Path) -> None:
    args = ("-p", "8", "-n", "2", "-d", "40,0", "-o", "json", "--sweep")
    result = cli("bench", tiny, *args, *QUICK)
    assert result.status == 0, result.err
    rows = json.loads(result.out)["results"]
    assert [(r["depth"], r["phase"], r["mode"]) for r in rows] == [
        (depth, phase, mode)
        for depth in (0, 40)
        for phase in ("prefill", "decode")
        for mode in ("auto", "absorbed", "expanded")
    ]
    for row in rows:
        assert row["mode"] in ("auto", row["attention"])


def test_peer_takes_turns(cli: Cli, tiny: Path, fake_peer: Path) -> None:
    args = ("-p", "8", "-n", "2", "-d", "0,16", "--peer", "llama-cpp-python")
    result = cli("bench", tiny, *args, "-o", "json", *QUICK)
    assert result.status == 0, result.err
    rows = json.loads(result.out)["results"]
    assert [row["program"] for row in rows] == ["mla_backend", "llama-cpp-python 9.9"] * 4
    for ours, peer in zip(rows[::2], rows[1::2], strict=True):
        assert peer["mode"] is None
        assert peer["attention"] is None
        assert peer["ratio"] == pytest.approx(ours["tps"] / peer["tps"])
    table = cli("bench", tiny, *args, *QUICK).out
    assert "| ratio |" in table


def test_peer_that_is_missing(cli: Cli, tiny: Path, fake_peer: Path) -> None:
    fake_peer.write_text("raise ImportError('no llama here')")
    result = cli("bench", tiny, "--peer", "llama-cpp-python", *QUICK)
    assert result.status == 1
    for text in ("no llama here", "pip install llama-cpp-python"):
        assert text in result.err


def test_peer_that_fails(cli: Cli, tiny: Path, fake_peer: Path) -> None:
    fake_peer.write_text("__version__ = '1'\ndef Llama(**_):\n    raise ValueError('too odd')\n")
    result = cli("bench", tiny, "--peer", "llama-cpp-python", *QUICK)
    assert result.status == 1
    assert "too odd" in result.err
    fake_peer.write_text("__version__ = '1'\ndef Llama(**_):\n    raise SystemExit(3)\n")
    result = cli("bench", tiny, "--peer", "llama-cpp-python", *QUICK)
    assert result.status == 1
    assert "its process ended" in result.err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("-p", "5,x"), "-p '5,x'"),
        (("-d", "-1"), "-d '-1'"),
        (("-p", "0", "-n", "0"), "nothing to measure"),
        (("-n", "-1"), "-n"),
        (("-o", "xml"), "csv"),
        (("--peer", "other"), "accepted are llama-cpp-python"),
        (("--peer", "llama-cpp-python", "--peer-python", "no/such/file"), "no/such/file"),
        (("--sweep", "--attention", "absorbed"), "--sweep measures all modes"),
        (("--plot", "picture.txt"), ".png"),
        (("--plot", "no/such/place/a.png"), "there is no directory"),
    ],
)
def test_usage_errors(cli: Cli, tiny: Path, args: tuple[str, ...], message: str) -> None:
    result = cli("bench", tiny, *args)
    assert result.status == 2
    assert result.out == ""
    assert message in result.err


def test_context_that_is_too_short(cli: Cli, tiny: Path) -> None:
    result = cli("bench", tiny, "-p", "64", "-c", "32", *QUICK)
    assert result.status == 1
    assert "context" in result.err


def test_plot_is_drawn(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    picture = tmp_path / "rates.png"
    args = ("-p", "4,8", "-n", "2", "-d", "0,8", "--sweep", "--plot", picture)
    result = cli("bench", tiny, *args, *QUICK)
    assert result.status == 0, result.err
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_plot_without_matplotlib(
    cli: Cli, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = cli("bench", tiny, "--plot", tmp_path / "rates.png")
    assert result.status == 1
    assert "mla_backend[plot]" in result.err


def test_in_python(tiny: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    with Model.load(tiny, n_ctx=64, threads=1, device="cpu", n_batch=8) as model:
        found = model.bench(20, 4, 10, repeats=2, on_progress=lambda *call: calls.append(call))
        assert found.keys() == BenchResult.__annotations__.keys()
        assert (found["n_prompt"], found["n_gen"], found["depth"]) == (20, 4, 10)
        assert (found["repeats"], found["n_threads"]) == (2, 1)
        assert calls == [("bench", i, 4) for i in range(1, 5)]
        for name in ("prefill_tps", "decode_tps", "read_gbps", "tops", "limit_read_gbps"):
            assert found[name] > 0, name  # type: ignore[literal-required]
        part = model.bench(8, 0, attention="expanded", repeats=1)
        assert part["prefill_attention"] == "expanded"
        assert part["decode_tps"] is None
        assert part["read_gbps"] is None


def test_model_is_as_before(tiny: Path) -> None:
    with Model.load(tiny, n_ctx=64, threads=1, device="cpu") as model:
        before = model.logits([1, 2, 3])
        model.bench(8, 4, attention="expanded", repeats=1)
        with model.own_session() as session:
            assert session.attention == "auto"
            assert session.tokens == []
        assert (model.logits([1, 2, 3]) == before).all()


def test_arguments_in_python(tiny: Path) -> None:
    with Model.load(tiny, n_ctx=64, threads=1, device="cpu") as model:
        for bad in ((-1, 1, 0), (1, -1, 0), (1, 1, -1), (0, 0, 0)):
            with pytest.raises(UsageError):
                model.bench(*bad)
        with pytest.raises(UsageError, match="repeats"):
            model.bench(repeats=0)
        with pytest.raises(UsageError, match="absorbed"):
            model.bench(1, 1, attention="none")  # type: ignore[arg-type]
        with pytest.raises(ContextError, match="64"):
            model.bench(60, 1, depth=5)
