"""Small random models for tests that need a whole file but no reference values."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from mla_backend.synth import shape_named, write_model


@cache
def small_model(
    shape: str = "tiny-v2",
    type: str = "f32",
    layout: str = "split",
    *,
    seed: int = 0,
    shards: int = 1,
    **changes: Any,
) -> Path:
    """Path of a random model file, written at first use and shared by all tests of a run.

    ``changes`` are fields of ``ModelShape``, e.g. ``n_layer=2, tied=True``. With shards it is the
    path of the first one. Do not write to it: copy it first.
    """
    described = "-".join(f"{key}={value}" for key, value in sorted(changes.items()))
    name = f"{shape}-{type}-{layout}-{seed}{'-' if described else ''}{described}.gguf"
    written = write_model(
        _directory() / name,
        replace(shape_named(shape), **changes),
        type=type,
        layout=layout,  # type: ignore[arg-type]
        seed=seed,
        shards=shards,
    )
    return written[0]


@cache
def _directory() -> Path:
    directory = Path(tempfile.mkdtemp(prefix="mla-small-models-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory
