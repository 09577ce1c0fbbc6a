"""The bundled model, as it is shipped."""

from __future__ import annotations

import numpy as np
import pytest
from mla_backend.bundled import bundled_model
from mla_backend.cli import main
from mla_backend.config import config_from_gguf
from mla_backend.gguf import read_gguf
from mla_backend.model import Model


def test_size_and_shape() -> None:
    path = bundled_model()
    assert 8e6 < path.stat().st_size < 16e6
    config = config_from_gguf(read_gguf(path))
    assert config.moe is not None
    assert config.moe.gating == "sigmoid"
    assert config.q_lora_rank
    assert config.n_layer_nextn == 1
    assert config.rope.scaling == "yarn"


def test_its_license_lies_beside_it() -> None:
    notice = bundled_model().with_name("NOTICE.md").read_text()
    assert "Python Software Foundation License Version 2" in notice


def test_it_has_learned_python() -> None:
    """Bits per byte on source it was not trained on stay far below those of a compressor."""
    text = (
        "def partition(items, key):\n"
        '    """Split items by whether key is true for them."""\n'
        "    yes, no = [], []\n"
        "    for item in items:\n"
        "        if key(item):\n"
        "            yes.append(item)\n"
        "        else:\n"
        "            no.append(item)\n"
        "    return yes, no\n"
    )
    with Model.load(bundled_model(), n_ctx=256) as model:
        ids = model.tokenizer.encode(text)
        result = model.generate(ids[:1], max_tokens=1, logprobs=1)
        assert result.tokens
        logits = model.logits(ids).astype(float)
    log_p = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    bits = -log_p[np.arange(len(ids) - 1), ids[1:]].sum() / np.log(2)
    assert bits / len(text.encode()) < 1.3


def test_demo(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "-n", "8"]) == 0
    out, err = capfd.readouterr()
    assert "class Stack:" in out
    assert "bundled model" in err
    assert "tokens/s" in err


def test_run_without_a_model_says_which_it_takes(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "-p", "import os", "-n", "4", "--seed", "1"]) == 0
    out, err = capfd.readouterr()
    assert out
    assert "bundled model" in err
