"""Latent attention, absorbed and expanded, against float64: formats, layouts, batches, messages."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from latent_cache import CACHE_FORMATS, LatentCache, Runner, constant, empty_cache, scattered
from mla_backend import _core, ops
from mla_backend.errors import ShapeError, UnsupportedError
from mla_backend.ops import QuantTensor, Where
from reference.attention import F64, Span, attention, cells_of
from reference.errors import nmse

Array = npt.NDArray[Any]
EXACT_NMSE = 1e-11  # float32 sums of up to 1500 terms; the bound of `exact` is 1e-10
FAST_NMSE = 5e-4
BOUNDS = {"exact": EXACT_NMSE, "fast": FAST_NMSE}
# On the CPU `fast` rounds queries and cells only beside quantized weights.
WEIGHTS = {"exact": "F32", "fast": "Q8_0"}
MODES = {"absorbed": 0, "expanded": 1}


@dataclass(frozen=True)
class Case:
    """Everything one call needs."""

    q_nope: Array  # [T, H, N]
    q_rope: Array  # [T, H, R]
    k_b: Array  # [H, C, N]
    v_b: Array  # [H, V, C]
    cache: LatentCache
    spans: list[Span]
    block_table: Array
    block_cells: int
    scale: float = 0.3
    precision: str = "exact"
    k_b_transposed: bool = False
    place: Any = constant  # how q lies in memory

    def in_mode(self, mode: str) -> Case:
        spans = [span._replace(expanded=MODES[mode]) for span in self.spans]
        return replace(self, spans=spans)

    def want(self) -> F64:
        return attention(
            self.q_nope,
            self.q_rope,
            self.cache.decoded(0),
            self.cache.decoded(1),
            self.k_b,
            self.v_b,
            self.spans,
            self.block_table,
            scale=self.scale,
            block_cells=self.block_cells,
        )

    def got(self, where: Where, k_b: _core.Tensor | None = None, v_b: Any = None) -> Array:
        runner = Runner(where)
        g = runner.graph
        own = np.swapaxes(self.k_b, 1, 2) if self.k_b_transposed else self.k_b
        n_rows = len(self.spans) + 2
        spans = np.full((n_rows, 6), -7, np.int32)  # what follows the end is not looked at
        spans[: len(self.spans)] = np.array(self.spans, np.int32).reshape(-1, 6)
        spans[len(self.spans), 2] = 0
        node = g.mla_attention(
            self.place(g, "q_nope", self.q_nope),
            self.place(g, "q_rope", self.q_rope),
            *runner.planes(self.cache),
            g.weight("k_b", k_b) if k_b else constant(g, "k_b", np.ascontiguousarray(own)),
            g.weight("v_b", v_b) if v_b else constant(g, "v_b", self.v_b),
            g.input("spans", "I32", [n_rows, 6]),
            g.input("block_table", "I32", list(self.block_table.shape)),
            scale=self.scale,
            k_b_transposed=self.k_b_transposed,
            block_cells=self.block_cells,
            precision=self.precision,
        )
        g.output(node)
        return runner.run({"spans": spans, "block_table": self.block_table})


def make_case(
    dims: tuple[int, int, int, int, int],
    lengths: list[tuple[int, int]],
    *,
    formats: tuple[str, str] = ("F32", "F32"),
    block_cells: int = 64,
    n_idle_tokens: int = 0,
    seed: int = 0,
    **rest: Any,
) -> Case:
    """dims H, N, R, C, V; lengths: (n_tokens, n_cells) of each sequence, in a shuffled cache.

    Sequences skip some cells of their first block, blocks are in any order, the order of the
    tokens is not that of the sequences, and ``n_idle_tokens`` of them are in no span.
    """
    h, n, r, c, v = dims
    rng = np.random.default_rng(seed)
    skips = rng.integers(0, min(block_cells, 9), len(lengths))
    n_blocks = [-(-(s + skip) // block_cells) for (_, s), skip in zip(lengths, skips, strict=True)]
    free = rng.permutation(sum(n_blocks) + 2).astype(np.int32)
    table = np.full((len(lengths) + 1, max(n_blocks, default=0) + 1), -3, np.int32)
    spans, token = [], 0
    for i in rng.permutation(len(lengths)):
        table[i + 1, : n_blocks[i]], free = free[: n_blocks[i]], free[n_blocks[i] :]
        spans.append(Span(int(i) + 1, token, lengths[i][0], int(skips[i]), lengths[i][1], 0))
        token += lengths[i][0]
    n_tokens = token + n_idle_tokens
    cache = empty_cache((sum(n_blocks) + 2) * block_cells, formats, (c, r))
    for span in spans:
        cells = cells_of(span, table, block_cells)
        for plane in range(2):
            rows = rng.normal(size=(len(cells), (c, r)[plane])).astype(np.float32)
            cache.fill(plane, cells, rows)
    return Case(
        q_nope=rng.normal(size=(n_tokens, h, n)).astype(np.float32),
        q_rope=rng.normal(size=(n_tokens, h, r)).astype(np.float32),
        k_b=(rng.normal(size=(h, c, n)) / np.sqrt(c)).astype(np.float32),
        v_b=(rng.normal(size=(h, v, c)) / np.sqrt(c)).astype(np.float32),
        cache=cache,
        spans=spans,
        block_table=table,
        block_cells=block_cells,
        **rest,
    )


def encoded(x: Array, format: str) -> tuple[_core.Tensor, Array]:
    """x as a weight of the core, and the numbers it holds."""
    weight: QuantTensor = ops.quantize(np.ascontiguousarray(x), format)
    tensor = _core.Tensor(weight.rows, format, list(x.shape))
    return tensor, weight.dequantize()


def with_weights(
    case: Case, k_format: str, v_format: str = ""
) -> tuple[Case, _core.Tensor, _core.Tensor]:
    """The case with the numbers that its weights have once encoded, and these weights."""
    own = np.swapaxes(case.k_b, 1, 2) if case.k_b_transposed else case.k_b
    k_b, k_numbers = encoded(own, k_format)
    v_b, v_numbers = encoded(case.v_b, v_format or k_format)
    k_numbers = np.swapaxes(k_numbers, 1, 2) if case.k_b_transposed else k_numbers
    return replace(case, k_b=k_numbers, v_b=v_numbers), k_b, v_b


def check_modes(case: Case, where: Where, bound: float, weights: str = "F32") -> None:
    case, k_b, v_b = with_weights(case, weights)
    want = case.want()
    for mode in MODES:
        got = case.in_mode(mode).got(where, k_b, v_b)
        assert got.dtype == np.float32
        assert nmse(got, want) <= bound, mode


# ---- shapes and formats --------------------------------------------------------------------------

# H, N, R, C, V with what a vector, a register tile or a group of heads leaves over.
DIMS = [
    (1, 1, 2, 1, 1),
    (2, 5, 6, 33, 3),
    (3, 16, 2, 96, 17),
    (16, 32, 16, 64, 32),
    (17, 7, 4, 40, 9),
]


@pytest.mark.parametrize("dims", DIMS)
@pytest.mark.parametrize("n_tokens", [1, 2, 5, 33, 70])
def test_shapes(where: Where, dims: tuple[int, ...], n_tokens: int) -> None:
    for n_cells in (n_tokens, n_tokens + 1, n_tokens + 130):
        case = make_case(dims, [(n_tokens, n_cells)], seed=n_tokens)  # type: ignore[arg-type]
        check_modes(case, where, EXACT_NMSE)


@pytest.mark.parametrize(
    "dims", [(1, 32, 2, 32, 1), (3, 32, 6, 96, 17), (17, 64, 64, 64, 80), (70, 96, 20, 160, 33)]
)
@pytest.mark.parametrize("n_tokens", [1, 2, 5, 33, 70])
def test_shapes_of_quantized_weights(where: Where, dims: tuple[int, ...], n_tokens: int) -> None:
    """N and C are whole blocks; the rest is what registers, tiles and groups leave over."""
    for n_cells in (n_tokens, n_tokens + 1, n_tokens + 130):
        case = make_case(
            dims,  # type: ignore[arg-type]
            [(n_tokens, n_cells)],
            seed=n_tokens,
            precision="fast",
            scale=0.1,
        )
        for transposed in (False, True):
            check_modes(replace(case, k_b_transposed=transposed), where, FAST_NMSE, "Q8_0")


@pytest.mark.parametrize("formats", CACHE_FORMATS)
@pytest.mark.parametrize("k_b_transposed", [False, True])
@pytest.mark.parametrize("precision", BOUNDS)
def test_cache_formats(
    where: Where, formats: tuple[str, str], k_b_transposed: bool, precision: str
) -> None:
    for n_tokens, n_cells in [(1, 200), (40, 90)]:
        case = make_case((3, 32, 10, 96, 20), [(n_tokens, n_cells)], formats=formats)
        case = replace(case, k_b_transposed=k_b_transposed, precision=precision)
        check_modes(case, where, BOUNDS[precision], WEIGHTS[precision])


@pytest.mark.parametrize("n_tokens", [1, 3, 70])
@pytest.mark.parametrize("precision", BOUNDS)
def test_long_context(where: Where, n_tokens: int, precision: str) -> None:
    """Several splits, several blocks of expansion, all cut in awkward places."""
    dims = (2, 32, 8, 64, 16)
    case = make_case(dims, [(n_tokens, 1501)], formats=("F16", "F16"), precision=precision)
    check_modes(case, where, BOUNDS[precision], WEIGHTS[precision])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("precision", BOUNDS)
def test_more_rows_than_a_round_has(where: Where, mode: str, precision: str) -> None:
    case = make_case((40, 32, 4, 32, 8), [(110, 115), (50, 600)], precision=precision)
    case, k_b, v_b = with_weights(case.in_mode(mode), WEIGHTS[precision])
    assert nmse(case.got(where, k_b, v_b), case.want()) <= BOUNDS[precision]


def test_strided_queries(where: Where) -> None:
    case = make_case((3, 8, 6, 64, 8), [(5, 80)], place=scattered)
    check_modes(case, where, EXACT_NMSE)


def test_interleaved_weights(where: Where) -> None:
    """k_b and v_b as the two halves of every head's rows in one tensor, as old files have them."""
    h, n, r, c, v = 3, 24, 8, 64, 16
    case = make_case((h, n, r, c, v), [(6, 100)], k_b_transposed=True)
    both = np.concatenate([np.swapaxes(case.k_b, 1, 2), case.v_b], axis=1)  # [H, N + V, C]
    strides = list(both.strides)
    k_b = _core.Tensor(both, "F32", [h, n, c], strides)
    v_b = _core.Tensor(both, "F32", [h, v, c], strides, n * strides[1])
    for mode in MODES:
        assert nmse(case.in_mode(mode).got(where, k_b, v_b), case.want()) <= EXACT_NMSE


# ---- batches -------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_cells", [1, 7, 64])
@pytest.mark.parametrize("precision", BOUNDS)
def test_sequences_share_a_batch(where: Where, block_cells: int, precision: str) -> None:
    """Shuffled blocks, skipped cells, both modes in one call, tokens that belong to nobody."""
    lengths = [(1, 40), (9, 9), (1, 300), (33, 150), (2, 130)]
    case = make_case(
        (3, 32, 8, 32, 16),
        lengths,
        formats=("F16", "F16"),
        block_cells=block_cells,
        n_idle_tokens=3,
        precision=precision,
    )
    spans = [span._replace(expanded=i % 2) for i, span in enumerate(case.spans)]
    case, k_b, v_b = with_weights(replace(case, spans=spans), WEIGHTS[precision])
    got = case.got(where, k_b, v_b)
    assert nmse(got, case.want()) <= BOUNDS[precision]
    assert not got[-3:].any()
    # A sequence's numbers do not depend on who shares its batch.
    for span in spans:
        tokens = slice(span.first_token, span.first_token + span.n_tokens)
        alone = replace(case, spans=[span]).got(where, k_b, v_b)
        np.testing.assert_array_equal(got[tokens], alone[tokens])


def test_no_spans_and_no_tokens(where: Where) -> None:
    case = make_case((2, 8, 4, 32, 8), [(2, 10)])
    assert not replace(case, spans=[]).got(where).any()
    nothing = replace(case, spans=[], q_nope=case.q_nope[:0], q_rope=case.q_rope[:0])
    assert nothing.got(where).shape == (0, 2, 8)


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("mode", MODES)
def test_threads_do_not_change_a_bit(isa: str, mode: str, precision: str) -> None:
    lengths = [(1, 1000), (70, 600), (3, 50)]
    case = make_case((5, 32, 16, 64, 32), lengths, formats=("F16", "F16"), precision=precision)
    case, k_b, v_b = with_weights(case.in_mode(mode), WEIGHTS[precision])
    results = [case.got({"isa": isa, "threads": n}, k_b, v_b) for n in (1, 2, 5)]
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


def test_one_call_or_token_by_token(where: Where) -> None:
    """A prompt in one span, or each token as a span that sees the cells up to itself."""
    case = make_case((2, 16, 8, 32, 16), [(20, 90)])
    whole = case.spans[0]
    singles = [
        whole._replace(first_token=t, n_tokens=1, n_cells=whole.n_cells - 19 + t, expanded=t % 2)
        for t in range(20)
    ]
    assert nmse(replace(case, spans=singles).got(where), case.want()) <= EXACT_NMSE


# ---- weights and precision -----------------------------------------------------------------------


@pytest.mark.parametrize("format", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q6_K", "IQ4_XS"])
@pytest.mark.parametrize("k_b_transposed", [False, True])
@pytest.mark.parametrize(("precision", "bound"), [("exact", EXACT_NMSE), ("fast", FAST_NMSE)])
def test_weight_formats(
    where: Where, format: str, k_b_transposed: bool, precision: str, bound: float
) -> None:
    """N is a whole block of the largest format, as k_b [H, C, N] is encoded along N."""
    case = make_case((2, 256, 16, 256, 24), [(1, 70), (9, 60)], formats=("F16", "F16"), scale=0.05)
    case = replace(case, k_b_transposed=k_b_transposed, precision=precision)
    check_modes(case, where, bound, format)


# ---- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.0, 1e-3, 40.0])
def test_flat_and_sharp_softmax(where: Where, scale: float) -> None:
    """At 40 one cell takes nearly all; scores in the thousands round to 1e-4 absolutely."""
    case = make_case((2, 32, 8, 32, 16), [(4, 300)], scale=scale)
    check_modes(case, where, 1e-6 if scale > 1 else EXACT_NMSE)
    if scale < 1:
        check_modes(replace(case, precision="fast"), where, FAST_NMSE, "Q8_0")


@pytest.mark.parametrize("precision", BOUNDS)
def test_nan_is_not_hidden(where: Where, precision: str) -> None:
    case = make_case((2, 32, 8, 32, 16), [(3, 200)], precision=precision)
    case, k_b, v_b = with_weights(case, WEIGHTS[precision])
    case.q_nope[1, 0, 3] = np.nan
    for mode in MODES:
        got = case.in_mode(mode).got(where, k_b, v_b)
        assert np.isnan(got[1, 0]).all()
        assert np.isfinite(np.delete(got.reshape(6, 16), 2, axis=0)).all()


def rope_scores(case: Case, rows: Array) -> Case:
    """Scores come from the rope part alone: rows [n_cells, R] of the first span's cells."""
    cells = cells_of(case.spans[0], case.block_table, case.block_cells)
    case.cache.fill(1, cells, rows)
    case.q_nope[...] = 0
    return case


@pytest.mark.parametrize("precision", BOUNDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("n_cells", [5, 70, 1301])
def test_scores_of_minus_infinity(isa: str, mode: str, precision: str, n_cells: int) -> None:
    """They are weights of 0, wherever they are; a row that has no other is not a number."""
    n_tokens = min(n_cells, 3)
    case = make_case((2, 32, 2, 32, 4), [(n_tokens, n_cells)], precision=precision)
    case, k_b, v_b = with_weights(case.in_mode(mode), WEIGHTS[precision])
    case = rope_scores(case, np.ones((n_cells, 2), np.float32))
    where: Where = {"isa": isa, "threads": 2}
    case.got(where, k_b, v_b)
    case.q_rope[0, 0, 0] = -np.inf
    got = case.got(where, k_b, v_b)
    assert np.isnan(got[0, 0]).all()
    rest = np.delete(got.reshape(-1, 4), 0, axis=0)
    want = np.delete(replace(case, q_rope=np.nan_to_num(case.q_rope)).want().reshape(-1, 4), 0, 0)
    assert nmse(rest, want) <= BOUNDS[precision]

    case.q_rope[...] = np.abs(np.nan_to_num(case.q_rope, neginf=1.0))
    finite = np.ones((n_cells, 2), np.float32)
    finite[: n_cells * 3 // 4 - 2] = -np.inf
    case = rope_scores(case, finite)
    assert nmse(case.got(where, k_b, v_b), case.want()) <= BOUNDS[precision]


@pytest.mark.parametrize("precision", BOUNDS)
@pytest.mark.parametrize("mode", MODES)
def test_equal_scores_are_an_even_mean(isa: str, mode: str, precision: str) -> None:
    """Nothing decays on the way through 16384 cells: +1 and -1 in its halves have the mean 0."""
    n_cells = 16384
    case = make_case((2, 32, 2, 32, 4), [(1, n_cells)], precision=precision)
    case = rope_scores(case, np.ones((n_cells, 2), np.float32))
    case.q_rope[...] = [[[3.7, 8.1], [23.3, 31.9]]]
    cells = cells_of(case.spans[0], case.block_table, case.block_cells)
    case.cache.fill(0, cells, np.repeat([1.0, -1.0], n_cells // 2)[:, None] * np.ones((1, 32)))
    case.v_b[...] = 1 / 32
    case, k_b, v_b = with_weights(case.in_mode(mode), WEIGHTS[precision])
    got = case.got({"isa": isa, "threads": 2}, k_b, v_b)
    assert np.abs(got).max() <= (1e-6 if precision == "fast" else 1e-5)


# ---- messages ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sequence": 2}, "span 0: sequence 2, the block table has 2"),
        ({"sequence": -1}, "span 0: sequence -1"),
        ({"first_token": 1}, "first_token 1, n_tokens 3, there are 3 tokens"),
        ({"n_tokens": -1}, "n_tokens -1"),
        ({"first_token": -1}, "first_token -1"),
        ({"n_cells": 2}, "n_cells 2"),
        ({"first_cell": -1}, "first_cell -1"),
        ({"n_cells": 400}, "n_cells 400, accepted is at most 3 blocks of 64"),
        ({"n_cells": 190, "first_cell": 0}, r"block_table\[1\]\[2\] is -3"),
    ],
)
@pytest.mark.parametrize("mode", MODES)
def test_spans_are_checked(mode: str, change: dict[str, int], message: str) -> None:
    case = make_case((2, 8, 4, 32, 8), [(3, 110)]).in_mode(mode)
    spans = [case.spans[0]._replace(**change)]
    with pytest.raises(ShapeError, match=message):
        replace(case, spans=spans).got({})


def test_blocks_are_checked() -> None:
    case = make_case((2, 8, 4, 32, 8), [(3, 100)])
    case.block_table[1, 0] = 9999
    with pytest.raises(ShapeError, match=r"block_table\[1\]\[0\] is 9999.*the cache has 256 cells"):
        case.got({})


def test_a_token_is_in_one_span() -> None:
    case = make_case((2, 8, 4, 32, 8), [(3, 100)])
    with pytest.raises(ShapeError, match="span 1: token 0 is in an earlier span"):
        replace(case, spans=case.spans * 2).got({})


def test_scattered_weight_rows_are_refused() -> None:
    case = make_case((2, 8, 4, 32, 8), [(3, 100)])
    v_b = _core.Tensor(np.zeros((2, 8, 64), np.float32), "F32", [2, 8, 32], [2048, 256, 8])
    with pytest.raises(UnsupportedError, match="mla_attention"):
        case.got({}, v_b=v_b)
