"""Bytes of tensors, and metadata as stored: what files are copied and transformed from.

Plain reads, not mappings: memory stays bounded by what is asked for, and a file that is truncated
meanwhile gives an error instead of killing the process.
"""

from __future__ import annotations

import os

import numpy as np
import numpy.typing as npt

from ..errors import ModelError
from .header import read_metadata
from .types import GGUFFile, TensorInfo, Value


def read_bytes(file: GGUFFile, info: TensorInfo, first: int, count: int) -> npt.NDArray[np.uint8]:
    """``count`` bytes of a tensor from byte ``first`` on -> uint8 [count].

    Raises:
        OSError: naming the file, where it cannot be read.
        ModelError: it is shorter than when its header was read.
    """
    path = file.paths[info.shard]
    out = np.empty(count, np.uint8)
    view, position = memoryview(out), info.offset + first
    try:
        with path.open("rb", buffering=0) as stream:
            while view:
                got = os.preadv(stream.fileno(), [view], position)
                if got == 0:
                    raise ModelError(f"{path}: the file shrank while it was read")
                view, position = view[got:], position + got
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    return out


def copied_metadata(file: GGUFFile) -> dict[str, Value | np.generic]:
    """The keys of a file as they are stored, for another one.

    Numbers are NumPy scalars of their stored types. What describes the bytes of this file alone is
    left out: its division into shards, and its alignment.

    Raises:
        ModelError: the header is damaged.
    """
    path = file.paths[0]
    with path.open("rb", buffering=0) as stream:
        stored = read_metadata(stream, path, path.stat().st_size)
    return {
        key: value
        for key, value in stored.items()
        if not key.startswith("split.") and key != "general.alignment"
    }
