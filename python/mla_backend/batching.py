"""How a prompt is cut into passes through the model."""

from __future__ import annotations

from typing import Final

#: Passes shorter than this are cut as asked: evening them out gains nothing.
_EVEN_FROM: Final = 1024
#: Tokens of a pass that was evened out are a multiple of this, which kernels like.
_GRANULE: Final = 64


def pass_sizes(n_tokens: int, n_batch: int) -> list[int]:
    """Tokens of each pass: ``n_batch`` and what is left.

    A pass reads and unpacks all weights, however few its tokens are. So where little would be left
    after long passes, the last two share their tokens.
    """
    n_whole, left = divmod(n_tokens, n_batch)
    sizes = [n_batch] * n_whole
    if not left:
        return sizes
    if n_whole == 0 or n_batch < _EVEN_FROM or 4 * left >= n_batch:
        return [*sizes, left]
    both = n_batch + left
    first = -(-both // (2 * _GRANULE)) * _GRANULE
    return [*sizes[:-1], first, both - first]
