"""A checkpoint directory as published: configuration, tokenizer files, and weights in shards."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ..errors import ModelError
from .folding import folded
from .safetensors import StoredTensor, read_header

_INDEX: Final = "model.safetensors.index.json"
_SINGLE: Final = "model.safetensors"
#: Longer lists in an error end in the number of the others.
_SHOWN: Final = 20


@dataclass(frozen=True)
class Checkpoint:
    """What lies in a checkpoint directory.

    Attributes:
        path: the directory.
        config: ``config.json``.
        tensors: all tensors of all shards by name.
        files: the shards.
    """

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    files: tuple[Path, ...]

    @property
    def n_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.n_bytes for tensor in self.tensors.values())


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Read the headers of a checkpoint.

    Raises:
        ModelError: it is no directory, or one message with everything that is missing or damaged:
            files, tensors that the index promises, JSON.
    """
    path = Path(path)
    if not path.is_dir():
        kind = "a file" if path.exists() else "nothing"
        raise ModelError(f"{path}: found {kind}; accepted: the directory of a checkpoint")
    problems: list[str] = []
    config = read_json(path / "config.json", problems) or {}
    files, promised = _find_shards(path, problems)
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        if file.exists():
            _add(tensors, file, problems)
    if not problems:
        problems += _compare(tensors, promised)
    raise_all(path, problems)
    return Checkpoint(path, config, tensors, tuple(files))


def read_json(path: Path, problems: list[str], *, required: bool = True) -> dict[str, Any] | None:
    """A JSON object, or None with the reason added to ``problems``."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        if required:
            problems.append(f"{path.name}: missing")
        return None
    except OSError as error:
        problems.append(f"{path.name}: cannot be read: {error.strerror or error}")
        return None
    except (ValueError, RecursionError) as error:
        problems.append(f"{path.name}: no valid JSON: {error}")
        return None
    if not isinstance(value, dict):
        problems.append(f"{path.name}: found JSON of type {type(value).__name__}; accepted: object")
        return None
    return value


def raise_all(path: Path, problems: list[str]) -> None:
    """Raise ModelError with all of ``problems``, if there are any; layers and experts folded."""
    if problems:
        lines = "".join(f"\n  {problem}" for problem in folded(problems))
        raise ModelError(f"{path}: this checkpoint cannot be converted:{lines}")


def listed(names: list[str]) -> str:
    """Names with commas, of a long list the first ones and the number of the others."""
    text = ", ".join(names[:_SHOWN])
    return text if len(names) <= _SHOWN else f"{text} and {len(names) - _SHOWN} more"


def _find_shards(path: Path, problems: list[str]) -> tuple[list[Path], dict[str, str]]:
    """The weight files, and where the index says each tensor is (empty without an index)."""
    if not (path / _INDEX).exists():
        files = (
            [path / _SINGLE] if (path / _SINGLE).exists() else sorted(path.glob("*.safetensors"))
        )
        if not files:
            old = any(path.glob("*.bin")) or any(path.glob("*.pt*"))
            hint = " (PyTorch files are not read: convert them to safetensors first)" if old else ""
            problems.append(f"no {_INDEX} and no *.safetensors{hint}")
        return files, {}
    index = read_json(path / _INDEX, problems) or {}
    where = index.get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(v, str) for v in where.values()):
        problems.append(f"{_INDEX}: weight_map: accepted: an object of tensor and file names")
        return [], {}
    # A name from a downloaded file must not lead out of its directory.
    outside = sorted({name for name in where.values() if Path(name).name != name})
    if outside:
        problems.append(
            f"{_INDEX}: weight_map: found {listed(outside)}; accepted: plain file names"
        )
        return [], {}
    files = [path / name for name in sorted(set(where.values()))]
    missing = [file.name for file in files if not file.exists()]
    if missing:
        problems.append(
            f"{len(missing)} of {len(files)} weight files are missing: {listed(missing)}"
        )
    return files, where


def _add(tensors: dict[str, StoredTensor], file: Path, problems: list[str]) -> None:
    try:
        found = read_header(file)
    except ModelError as error:
        problems.append(str(error).removeprefix(f"{file.parent}/"))
        return
    for name, tensor in found.items():
        if name in tensors:
            problems.append(f"{file.name}: tensor {name!r} is also in {tensors[name].path.name}")
        tensors[name] = tensor


def _compare(tensors: Mapping[str, StoredTensor], promised: Mapping[str, str]) -> list[str]:
    absent = [f"{name} ({file})" for name, file in promised.items() if name not in tensors]
    if absent:
        return [f"{len(absent)} tensors of {_INDEX} are not in the files: {listed(folded(absent))}"]
    return []
