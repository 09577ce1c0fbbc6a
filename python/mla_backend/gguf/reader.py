"""From a path to a GGUFFile: opening, finding the shards of split files, joining them."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from types import MappingProxyType

from ..errors import ModelError
from .header import Header, read_header
from .types import GGUFFile, TensorInfo, Value

_SHARD_NAME = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


def read_gguf(path: str | Path) -> GGUFFile:
    """Read the header of a GGUF file (versions 2 and 3, little-endian).

    Args:
        path: a file, or any shard of a split one (``name-00001-of-0000N.gguf``). Siblings are
            looked for beside the name as given, without resolving symbolic links.

    Raises:
        ModelError: the file or a shard is missing, unreadable, damaged or of another kind; the
            message names the file, the field, what was found and what is accepted.
    """
    paths = _shard_paths(Path(path))
    headers: list[Header] = []
    sizes: list[int] = []
    for index, shard in enumerate(paths):
        header, n_bytes = _read_shard(shard, index)
        headers.append(header)
        sizes.append(n_bytes)
    _check_split(paths, headers)
    return GGUFFile(
        paths=paths,
        shard_bytes=tuple(sizes),
        version=headers[0].version,
        alignment=headers[0].alignment,
        metadata=MappingProxyType(headers[0].metadata),
        tensors=MappingProxyType(_join_tensors(paths, headers)),
    )


def _shard_paths(path: Path) -> tuple[Path, ...]:
    match = _SHARD_NAME.fullmatch(path.name)
    if match is None:
        return (path,)
    number, count = int(match["number"]), int(match["count"])
    if not 1 <= number <= count:
        raise ModelError(f"{path}: found shard number {number} of {count}; accepted: 1 to {count}")
    shards = tuple(
        path.with_name(f"{match['stem']}-{index:05d}-of-{count:05d}.gguf")
        for index in range(1, count + 1)
    )
    missing = [shard for shard in shards if not os.path.exists(shard)]
    if missing == list(shards):
        return (path,)  # opening it tells why
    if missing:
        raise ModelError(
            f"{path} is one of {count} shards, of which {len(missing)} are missing in "
            f"{path.parent}: {', '.join(shard.name for shard in missing)}"
        )
    return shards


def _read_shard(path: Path, index: int) -> tuple[Header, int]:
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise ModelError(f"{path}: found a directory; accepted: the path of a .gguf file")
        if not stat.S_ISREG(status.st_mode):
            raise ModelError(f"{path}: found a pipe, socket or device; accepted: a regular file")
        # Unbuffered: the cursor reads whole windows and keeps them itself.
        with path.open("rb", buffering=0) as file:
            return read_header(file, path, status.st_size, index), status.st_size
    except FileNotFoundError as error:
        raise ModelError(f"{path}: no such file") from error
    except PermissionError as error:
        raise ModelError(f"{path}: no permission to read this file") from error
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{str(path)!r}: not a valid path: {error}") from error


def _check_split(paths: tuple[Path, ...], headers: list[Header]) -> None:
    """Compare the split keys, where present, with the shards found by name."""
    for index, (path, header) in enumerate(zip(paths, headers, strict=True)):
        count = _split_key(path, header.metadata, "split.count")
        if count is not None and count != len(paths) and not (count == 0 and len(paths) == 1):
            raise ModelError(
                f"{path}: metadata 'split.count': found {count}, but the name stands for "
                f"{len(paths)} shard(s); accepted: the names that the splitting tool gave, "
                f"name-{1:05d}-of-{count:05d}.gguf and so on"
            )
        number = _split_key(path, header.metadata, "split.no")
        if number is not None and number != index:
            raise ModelError(
                f"{path}: metadata 'split.no': found {number}; accepted: {index}, as in its name"
            )
    expected = _split_key(paths[0], headers[0].metadata, "split.tensors.count")
    total = sum(len(header.tensors) for header in headers)
    if expected is not None and expected != total:
        raise ModelError(
            f"{paths[0]}: metadata 'split.tensors.count': found {expected}, but the "
            f"{len(paths)} shard(s) hold {total} tensors; accepted: equal numbers"
        )


def _split_key(path: Path, metadata: dict[str, Value], key: str) -> int | None:
    value = metadata.get(key)
    if value is not None and type(value) is not int:
        raise ModelError(f"{path}: metadata {key!r}: found {value!r}; accepted: an integer")
    return value


def _join_tensors(paths: tuple[Path, ...], headers: list[Header]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for path, header in zip(paths, headers, strict=True):
        for info in header.tensors:
            if info.name in tensors:
                other = paths[tensors[info.name].shard]
                raise ModelError(
                    f"{path}: tensor {info.name!r} is also in {other.name}; accepted: once"
                )
            tensors[info.name] = info
    return tensors
