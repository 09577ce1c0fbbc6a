"""Latent attention at `fast` on rows that tiles of tensor cores fit: real widths, many spans."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from mla_backend.ops import Where
from ops.test_mla_attention import Case, encoded, make_case, with_weights
from reference.errors import nmse

# Operands of 11 bits (8 with a bf16 cache); the CPU rounds activations to 8 bits of a block.
BOUNDS = {"F16": 5e-6, "BF16": 1e-4, "Q8_0": 5e-6}
CPU_BOUND = 5e-4
FORMATS = [("F16", "F16"), ("BF16", "BF16"), ("Q8_0", "F16")]
USUAL = (16, 128, 64, 512, 128)  # H, N, R, C, V


def check(case: Case, where: Where) -> None:
    case = replace(case.in_mode("absorbed"), precision="fast")
    if where.get("backend") == "cuda":
        assert nmse(case.got(where), case.want()) <= BOUNDS[case.cache.formats[0]]
        return
    blocks = all(n % 32 == 0 for n in case.k_b.shape[1:])
    case, k_b, v_b = with_weights(case, "Q8_0" if blocks else "F32")
    assert nmse(case.got(where, k_b, v_b), case.want()) <= CPU_BOUND


@pytest.mark.parametrize("formats", FORMATS)
@pytest.mark.parametrize(
    "dims",
    [USUAL, (3, 24, 8, 64, 20), (128, 128, 64, 512, 128), (20, 40, 64, 256, 30)],
)
def test_one_token(
    where: Where, formats: tuple[str, str], dims: tuple[int, int, int, int, int]
) -> None:
    check(make_case(dims, [(1, 300)], formats=formats, scale=0.1), where)


@pytest.mark.parametrize("dims", [USUAL, (4, 128, 64, 256, 128)])
@pytest.mark.parametrize("block_cells", [7, 64])
def test_spans_of_all_lengths(
    where: Where, dims: tuple[int, int, int, int, int], block_cells: int
) -> None:
    """Narrow and wide spans side by side, cut by blocks, with tokens of nobody."""
    lengths = [(1, 40), (9, 9), (1, 300), (33, 150), (2, 130)]
    case = make_case(
        dims,
        lengths,
        formats=("F16", "F16"),
        scale=0.1,
        block_cells=block_cells,
        n_idle_tokens=3,
    )
    check(case, where)


def test_more_spans_than_a_warp_has_lanes(where: Where) -> None:
    lengths = [(1, 10 + i) for i in range(70)]
    check(make_case((4, 16, 8, 64, 16), lengths, formats=("F16", "F16"), scale=0.1), where)


def test_more_rows_than_a_window(where: Where) -> None:
    lengths = [(200, 210), (100, 105)]
    check(make_case((128, 8, 8, 32, 8), lengths, formats=("F16", "F16"), scale=0.1), where)


@pytest.mark.parametrize("lengths", [[(1, 40), (9, 90), (2, 2)], [(1, 3 + i) for i in range(40)]])
@pytest.mark.parametrize("formats", [("F16", "F16"), ("Q8_0", "F16")])
@pytest.mark.parametrize("weights", ["F16", "Q8_0"])
def test_products_of_many_rows(
    where: Where, lengths: list[tuple[int, int]], formats: tuple[str, str], weights: str
) -> None:
    """Many tokens of many heads, where k_b and v_b are multiplied as matrices."""
    case = make_case((64, 32, 8, 96, 24), lengths, formats=formats, scale=0.1, n_idle_tokens=2)
    (k_b, k_numbers), (v_b, v_numbers) = encoded(case.k_b, weights), encoded(case.v_b, weights)
    case = replace(case.in_mode("absorbed"), k_b=k_numbers, v_b=v_numbers, precision="fast")
    bound = BOUNDS[formats[0]] if where.get("backend") == "cuda" else CPU_BOUND
    assert nmse(case.got(where, k_b, v_b), case.want()) <= bound


@pytest.mark.parametrize("k_b_transposed", [False, True])
def test_both_layouts_of_k_b(where: Where, k_b_transposed: bool) -> None:
    case = make_case((4, 128, 64, 512, 128), [(3, 100), (1, 70)], formats=("F16", "F16"), scale=0.1)
    check(replace(case, k_b_transposed=k_b_transposed), where)


def test_nan_stays_in_its_row(where: Where) -> None:
    case = make_case((2, 16, 8, 32, 16), [(3, 200)], formats=("F16", "F16"), precision="fast")
    case.q_nope[1, 0, 3] = np.nan
    got = case.in_mode("absorbed").got(where)
    assert np.isnan(got[1, 0]).all()
    assert np.isfinite(np.delete(got.reshape(6, 16), 2, axis=0)).all()
