"""Which way attention goes, and that it is the cheaper one."""

from __future__ import annotations

import pytest
from mla_backend import _core
from mla_backend.attention_mode import HeadDims, expands

#: The widths of the published models.
REAL = HeadDims(512, 128, 64, 128)
ISAS = ["", *_core.compiled_isas()]


def costs(dims: HeadDims, n_tokens: int, n_cells: int) -> tuple[int, int]:
    """Multiply-adds per head: (absorbed, expanded)."""
    c, n, r, v = dims
    absorbed = n_tokens * n_cells * (2 * c + r) + n_tokens * c * (n + v)
    expanded = n_tokens * n_cells * (n + v + r) + n_cells * c * (n + v)
    return absorbed, expanded


@pytest.mark.parametrize("mode", ["absorbed", "expanded"])
def test_fixed_modes(mode: str) -> None:
    for n_tokens in (1, 100, 1000):
        got = expands(REAL, mode, n_tokens, 1000, "avx2")  # type: ignore[arg-type]
        assert got == (mode == "expanded")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("n_cells", [1, 2, 100, 171, 1000, 100_000])
def test_fresh_prompts_expand(n_cells: int, isa: str) -> None:
    assert expands(REAL, "auto", n_cells, n_cells, isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("n_cells", [10, 100, 1000, 100_000])
def test_decoding_is_absorbed(n_cells: int, isa: str) -> None:
    assert not expands(REAL, "auto", 1, n_cells, isa)


@pytest.mark.parametrize("dims", [REAL, HeadDims(512, 192, 64, 256), HeadDims(256, 48, 32, 80)])
@pytest.mark.parametrize("n_cells", [10, 171, 512, 4096, 163_840])
def test_fewer_operations_win_where_speeds_are_equal(n_cells: int, dims: HeadDims) -> None:
    for n_tokens in (1, 9, 85, 100, 128, 157, 170, 172, 500, 4000):
        if n_tokens <= n_cells:
            absorbed, expanded = costs(dims, n_tokens, n_cells)
            assert expands(dims, "auto", n_tokens, n_cells, "") == (expanded <= absorbed)


def test_real_models_break_even_at_171() -> None:
    far = 10**9
    assert not expands(REAL, "auto", 170, far, "")
    assert expands(REAL, "auto", 171, far, "")


@pytest.mark.parametrize("isa", ISAS)
def test_one_break_even(isa: str) -> None:
    """Once more tokens expand, still more do not go back."""
    choices = [expands(REAL, "auto", n, 4096, isa) for n in range(1, 4097)]
    assert choices == sorted(choices)
    assert 50 < choices.index(True) < 172
