"""From a GGUF file to one of another type, weighted by importance where there is some."""

from __future__ import annotations

from .overrides import Override, parse_override
from .plan import QuantizePlan, estimate_seconds, plan_quantization, quantize_file

__all__ = [
    "Override",
    "QuantizePlan",
    "estimate_seconds",
    "parse_override",
    "plan_quantization",
    "quantize_file",
]
