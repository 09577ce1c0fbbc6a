"""Who may import whom. Arrows point downstream; nothing points back."""

from __future__ import annotations

import pytest
from architecture.tree import (
    CSRC,
    PACKAGE,
    cxx_files,
    imported_modules,
    includes,
    layer_of_cxx,
    python_files,
    shown,
)

# ---- C++: anything downstream --------------------------------------------------------------------

CXX_ARROWS = {
    "bindings": {"backends/*", "exec", "graph", "quant", "sys", "base"},
    "backends/*": {"exec", "graph", "quant", "base"},
    "backends/cpu": {"exec", "graph", "quant", "sys", "base"},
    "exec": {"graph", "quant", "base"},
    "graph": {"quant", "base"},
    "quant": {"base"},
    "sys": {"base"},
    "base": set(),
}


def allowed_cxx(layer: str) -> set[str]:
    own = CXX_ARROWS.get(layer, CXX_ARROWS["backends/*"] if layer.startswith("backends/") else None)
    assert own is not None, f"csrc/{layer} has no place among the arrows"
    return own | {layer}


def test_cxx_arrows() -> None:
    wrong = []
    for path in cxx_files():
        layer = layer_of_cxx(str(path.relative_to(CSRC)))
        allowed = allowed_cxx(layer)
        for name in includes(path):
            target = layer_of_cxx(name)
            is_backend = "backends/*" in allowed and target.startswith("backends/")
            if target not in allowed and not is_backend:
                wrong.append(f"{shown(path)} includes {name}")
    assert not wrong, "\n".join(wrong)


def test_includes_exist_and_start_at_csrc() -> None:
    missing = [
        f"{shown(path)} includes {name}"
        for path in cxx_files()
        for name in includes(path)
        if not (CSRC / name).is_file()
    ]
    assert not missing, "\n".join(missing)


def test_backends_do_not_know_each_other() -> None:
    for path in (CSRC / "backends").rglob("*"):
        if path.is_file():
            own = layer_of_cxx(str(path.relative_to(CSRC)))
            for name in includes(path):
                target = layer_of_cxx(name)
                assert not target.startswith("backends/") or target == own, shown(path)


# ---- Python: direct arrows only ------------------------------------------------------------------

# Files that share a layer's name share its arrows: the layer is split for size, not for meaning.
LAYER = {
    "__main__": "cli",
    "batching": "session",
    "benchmark": "model",
    "bundled": "model",
    "cache": "session",
    "cache_memory": "session",
    "cache_nodes": "session",
    "chat": "tokenizer",
    "chunks": "model",
    "config_keys": "config",
    "cost": "model",
    "diagnosis": "model",
    "eager": "ops",
    "energy": "model",
    "imatrix": "model",
    "imatrix_file": "gguf",
    "inspection": "model",
    "likelihood": "model",
    "limits": "model",
    "loading": "session",
    "locks": "session",
    "logits_file": "model",
    "memory": "session",
    "numa": "devices",
    "node_loading": "session",
    "nvml": "model",
    "perplexity": "model",
    "placement": "session",
    "planning": "model",
    "plots": "model",
    "pretokenizers": "tokenizer",
    "quant_tensor": "ops",
    "residency": "model",
    "runner": "session",
    "sampling_params": "sampling",
    "session_file": "session",
    "settling": "devices",
    "stops": "generator",
    "thinking": "tokenizer",
    "traffic": "model",
    "threads": "model",
    "tuned": "model",
    "tuning": "model",
    "vocabulary": "tokenizer",
}

ARROWS = {
    "cli": {"commands"},
    "commands": {"model", "convert", "quantize", "gguf", "synth", "peers"},
    "server": {"model"},
    "model": {"generator", "session"},
    "ops": {"_core", "formats", "attention_mode", "devices"},
    "attention_mode": set(),
    "peers": set(),
    "candidates": set(),
    "devices": {"_core"},
    "generator": {"session", "sampling", "candidates", "tokenizer"},
    "session": {
        "attention_mode",
        "candidates",
        "devices",
        "models",
        "weights",
        "config",
        "gguf",
        "_core",
    },
    "models": {"weights", "config", "_core"},
    "weights": {"config", "gguf", "_core"},
    "config": {"gguf"},
    "tokenizer": {"gguf"},
    "sampling": {"candidates"},
    "convert": {"config", "gguf", "formats", "_core"},
    "quantize": {"convert", "gguf", "formats", "_core"},
    "synth": {"convert", "config", "gguf", "formats", "_core"},
    "gguf": {"formats"},
    "formats": {"_core"},
    "errors": set(),
}

# Beyond the drawing, each for its reason. An entry that nobody needs any more fails a test.
EXTRA = {
    # The public face loads the file: it hands the parts to each other and keeps none of their work.
    ("model", "_core"),
    ("model", "attention_mode"),
    ("model", "config"),
    ("model", "devices"),
    ("model", "gguf"),
    ("model", "models"),
    ("model", "sampling"),
    ("model", "tokenizer"),
    ("model", "weights"),
    # Types of the public face: chunks, rates, sampling options, the token that cancels.
    ("commands", "_core"),
    ("commands", "generator"),
    ("commands", "sampling"),
    ("commands", "tokenizer"),
    ("generator", "_core"),
    # What the converter writes, the tokenizer reads: one table of pre-tokenizers and token types.
    ("convert", "tokenizer"),
    # Cache types are formats.
    ("session", "formats"),
    # What a converted file says of its text is what the tokenizer here can read: one table of
    # pre-tokenizers, one alphabet of bytes.
    ("convert", "tokenizer"),
}


def layer_of(module: str) -> str:
    top = module.split(".")[0]
    return LAYER.get(top, top)


def python_arrows() -> dict[tuple[str, str], list[str]]:
    """Arrows between layers as they are, with the imports behind each."""
    found: dict[tuple[str, str], list[str]] = {}
    for path in python_files():
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        if module == "__init__":
            continue
        layer = layer_of(module)
        assert layer in ARROWS, f"{shown(path)} has no place among the arrows"
        for name in sorted(imported_modules(path)):
            if layer_of(name) not in {layer, "errors"}:
                arrow = (layer, layer_of(name))
                found.setdefault(arrow, []).append(f"{shown(path)} imports {name}")
    return found


def test_python_arrows() -> None:
    wrong = [
        text
        for (layer, target), texts in python_arrows().items()
        if target not in ARROWS[layer] and (layer, target) not in EXTRA
        for text in texts
    ]
    assert not wrong, "\n".join(wrong)


def test_no_extra_arrow_is_idle() -> None:
    assert python_arrows().keys() >= EXTRA


def test_package_exports_the_public_face_only() -> None:
    public = {"model", "generator", "sampling", "session", "errors", "_core", "ops"}
    assert imported_modules(PACKAGE / "__init__.py") <= public


def downstream(layer: str) -> set[str]:
    return ARROWS.get(layer, set()) | {target for source, target in EXTRA if source == layer}


@pytest.mark.parametrize("layer", sorted(ARROWS))
def test_no_arrow_comes_back(layer: str) -> None:
    seen: set[str] = set()
    ahead = downstream(layer)
    while ahead:
        assert layer not in ahead, f"{layer} reaches itself"
        seen |= ahead
        ahead = set().union(*(downstream(name) for name in ahead)) - seen
