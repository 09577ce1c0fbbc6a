"""GGUF files: bytes <-> metadata and tensor positions. Knows nothing of models."""

from __future__ import annotations

from .reader import read_gguf
from .types import GGUFFile, TensorInfo, Value

__all__ = ["GGUFFile", "TensorInfo", "Value", "read_gguf"]
