"""Text in chunks of equal length, each read in a fresh context: how models are measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mla_backend.errors import UsageError
from mla_backend.tokenizer import Tokenizer

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Chunks:
    """Token ids of a text, I32 [n, n_ctx].

    Attributes:
        fed: what a model is given; it may begin each chunk with BOS.
        text: what the text has there.
    """

    fed: npt.NDArray[np.int32]
    text: npt.NDArray[np.int32]

    @property
    def n_ctx(self) -> int:
        """Tokens of a chunk."""
        return int(self.fed.shape[1])

    @property
    def first_scored(self) -> int:
        """The position whose logits are the first to be judged.

        It is the middle of the chunk, so that every guess has at least half a chunk to go by.
        """
        return self.n_ctx // 2

    def __len__(self) -> int:
        return int(self.fed.shape[0])

    def targets(self, index: int) -> npt.NDArray[np.int32]:
        """The tokens to be guessed in a chunk, at the positions from ``first_scored`` on."""
        return self.text[index, self.first_scored + 1 :]


def split_text(
    tokenizer: Tokenizer, text: str, n_ctx: int = 512, n_chunks: int | None = None
) -> Chunks:
    """Cut a text as llama.cpp's tools do.

    Control tokens in it are plain text. Where the tokenizer begins texts with BOS, it also
    replaces the first token of each chunk. Tokens beyond the last whole chunk are dropped.

    Args:
        n_ctx: tokens of a chunk, at least 4.
        n_chunks: take only that many.

    Raises UsageError where the text is shorter than one chunk, TokenizerError where it cannot be
    encoded.
    """
    if n_ctx < 4:
        raise UsageError(f"chunks of {n_ctx} tokens; accepted: 4 or more")
    if n_chunks is not None and n_chunks < 1:
        raise UsageError(f"{n_chunks} chunks; accepted: 1 or more")
    ids = tokenizer.encode(text, parse_special=False)
    found = len(ids) // n_ctx
    if found == 0:
        raise UsageError(
            f"the text has {len(ids)} tokens; accepted: at least the {n_ctx} of one chunk"
        )
    return cut(ids, n_ctx, min(found, n_chunks or found), tokenizer)


def cut(ids: Sequence[int], n_ctx: int, n_chunks: int, tokenizer: Tokenizer) -> Chunks:
    """The first ``n_chunks`` chunks of ``ids``, which are enough."""
    text = np.asarray(ids[: n_chunks * n_ctx], np.int32).reshape(n_chunks, n_ctx)
    fed = text.copy()
    if tokenizer.add_bos and tokenizer.bos_id is not None:
        fed[:, 0] = tokenizer.bos_id
    return Chunks(fed, text)
