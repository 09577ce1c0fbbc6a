"""The model that comes with the package: docs/model_card_demo.md says what it is."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from mla_backend.errors import ModelError

#: 20 million parameters, trained on Python's standard library and its documentation.
BUNDLED_MODEL: Final = Path(__file__).with_name("data") / "demo-Q4_K_M.gguf"


def bundled_model() -> Path:
    """Where the file lies. Raises ModelError where an installation left it out."""
    if not BUNDLED_MODEL.is_file():
        raise ModelError(f"{BUNDLED_MODEL}: the bundled model is not installed; name a model file")
    return BUNDLED_MODEL
