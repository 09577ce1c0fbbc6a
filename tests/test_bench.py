"""The benchmarks' own arithmetic, and the script that writes models."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from mla_backend.gguf import read_gguf
from mla_backend.synth import SHAPES
from small_models import small_model

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture
def cost(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCH)
    import cost

    return cost


def test_one_token_reads_what_it_uses(cost: ModuleType) -> None:
    path, shape = small_model("tiny-v2", "q4_k_m"), SHAPES["tiny-v2"]
    costs = cost.CostModel(path)
    n_bytes = n_params = 0.0
    for tensor in read_gguf(path).tensors.values():
        share = shape.n_expert_used / shape.n_expert if "_exps." in tensor.name else 1.0
        if tensor.name != "token_embd.weight":
            n_bytes += share * tensor.n_bytes
            n_params += share * math.prod(tensor.shape)
    cell_bytes = shape.n_layer * 2 * (shape.kv_lora_rank + shape.rope)
    attention = shape.n_layer * shape.n_head * 2 * (2 * shape.kv_lora_rank + shape.rope)
    found = costs.run(1, 99)
    assert costs.n_active_params == pytest.approx(n_params)
    assert found.n_bytes == pytest.approx(n_bytes + 100 * cell_bytes)
    assert found.n_flops == pytest.approx(2 * n_params + 100 * attention)


def test_prefill_reads_weights_once_per_pass(cost: ModuleType) -> None:
    costs = cost.CostModel(small_model("tiny-v2", "q4_k_m"))
    whole, halves = costs.prefill(512, 0, 512), costs.prefill(512, 0, 256)
    assert halves.n_bytes == pytest.approx(2 * whole.n_bytes, rel=0.3)
    assert whole.n_flops > 400 * costs.run(1, 0, outputs=0).n_flops
    assert whole.seconds(1.0, 1e9) == pytest.approx(whole.n_bytes / 1e9)


def test_script_writes_models(tmp_path: Path) -> None:
    def make(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(BENCH / "make_model.py"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    target = tmp_path / "m.gguf"
    options = ("--shape", "tiny-v3", "--layers", "2", "--experts", "8", "--layout", "legacy")
    done = make(str(target), *options)
    assert done.returncode == 0, done.stderr
    metadata = read_gguf(target).metadata
    assert metadata["deepseek2.block_count"] == 2
    assert metadata["deepseek2.expert_count"] == 8
    refused = make(str(tmp_path / "absent" / "m.gguf"))
    assert refused.returncode == 1
    assert "Traceback" not in refused.stderr
