"""Sizes on the command line: ``500M``, ``4G``."""

from __future__ import annotations

import re

from ..errors import UsageError

_SIZE = re.compile(r"(\d+)\s*([KMGT]?)(?:i?B)?", re.IGNORECASE)
_UNITS = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3, "T": 1000**4}


def parse_size(text: str, option: str) -> int:
    """Bytes of a size, in powers of 1000 as disks and other tools count.

    Raises UsageError naming ``option`` where it is none, or zero.
    """
    match = _SIZE.fullmatch(text.strip())
    n_bytes = int(match[1]) * _UNITS[match[2].upper()] if match else 0
    if n_bytes == 0:
        raise UsageError(f"{option}: found {text!r}; accepted: a number with K, M, G or T")
    return n_bytes
