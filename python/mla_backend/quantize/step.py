"""One tensor on its way from one file to the other."""

from __future__ import annotations

from dataclasses import dataclass

from ..gguf import TensorInfo
from ..gguf.writer import NewTensor
from ..imatrix_file import InputSums


@dataclass(frozen=True)
class Step:
    """How one tensor is made: what it becomes, of what, and how much its columns count."""

    target: NewTensor
    source: TensorInfo
    inputs: InputSums | None = None

    @property
    def is_copy(self) -> bool:
        """The numbers stay as they are."""
        return self.source.format == self.target.format

    @property
    def rows(self) -> int:
        """Rows of each matrix."""
        return self.source.shape[-2] if len(self.source.shape) > 1 else 1
