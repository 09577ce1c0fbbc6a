"""DeepSeek-family models through Multi-head Latent Attention.

    from mla_backend import Model
    with Model.load("model.gguf") as model:
        print(model.generate("Once upon a time", max_tokens=32).text)

``mla_backend.ops`` holds the single operations.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mla_backend._core import CancelToken
    from mla_backend.generator import Chunk, Completion, GenerationOptions, Stats
    from mla_backend.model import Model
    from mla_backend.sampling import SamplingParams
    from mla_backend.session import Session

__all__ = [
    "CancelToken",
    "Chunk",
    "Completion",
    "GenerationOptions",
    "Model",
    "SamplingParams",
    "Session",
    "Stats",
]

_HOMES = {
    "CancelToken": "_core",
    "Chunk": "generator",
    "Completion": "generator",
    "GenerationOptions": "generator",
    "Model": "model",
    "SamplingParams": "sampling",
    "Session": "session",
    "Stats": "generator",
}


def __getattr__(name: str) -> Any:
    """Import public names when first used, so that ``mla-backend --help`` starts at once."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
