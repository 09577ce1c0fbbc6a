"""Element formats of tensors: a view of the table that the C++ core is built from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mla_backend import _core
from mla_backend.errors import FormatError


@dataclass(frozen=True, slots=True)
class Format:
    """One way to store numbers: blocks of ``block_elems`` elements in ``block_bytes`` bytes."""

    name: str
    gguf_type: int
    block_elems: int
    block_bytes: int
    quantized: bool

    def n_bytes(self, shape: Sequence[int]) -> int:
        """Bytes of a contiguous tensor, ``shape`` outermost first.

        Raises FormatError where the innermost extent is no multiple of the block.
        """
        if not shape or shape[-1] % self.block_elems:
            raise FormatError(
                f"{self.name}: rows of {list(shape)} are no multiple of {self.block_elems} elements"
            )
        n_elems = 1
        for extent in shape:
            n_elems *= extent
        return n_elems // self.block_elems * self.block_bytes


FORMATS: tuple[Format, ...] = tuple(Format(*row) for row in _core.formats())
_BY_NAME = {row.name: row for row in FORMATS}
_BY_TYPE = {row.gguf_type: row for row in FORMATS}


def by_name(name: str) -> Format:
    """The format called ``name``, in any case. Raises FormatError naming the known ones."""
    found = _BY_NAME.get(name.upper())
    if found is None:
        known = ", ".join(_BY_NAME)
        raise FormatError(f"format {name!r} is unknown; accepted are {known}")
    return found


def by_gguf_type(gguf_type: int) -> Format:
    """The format with this GGUF tensor type id. Raises FormatError where there is none."""
    found = _BY_TYPE.get(gguf_type)
    if found is None:
        raise FormatError(f"GGUF tensor type {gguf_type} is not supported")
    return found
