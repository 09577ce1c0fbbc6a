"""Random-weight DeepSeek models of any shape: for benchmarks, tests and first steps.

The files have the names, shapes, types and metadata keys of real ones; their text means nothing.
"""

from __future__ import annotations

from ..convert.mixes import MIXES
from .shapes import SHAPES, ModelShape, shape_named
from .write import write_model

__all__ = ["MIXES", "SHAPES", "ModelShape", "shape_named", "write_model"]
