"""Memory of NUMA nodes, as far as a machine with one node can show it, and the split over nodes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mla_backend import _core
from mla_backend.errors import DeviceError, ShapeError, UnsupportedError

PAGE = _core.page_bytes()


def placed(memory: object) -> dict[int, int]:
    """The nodes of the memory's pages; skips where the system does not tell."""
    try:
        return _core.pages_by_node(memory)  # type: ignore[arg-type]
    except DeviceError as error:
        pytest.skip(str(error))


@given(
    n_rows=st.integers(0, 10_000),
    weights=st.lists(st.integers(0, 96), min_size=1, max_size=9).filter(any),
    granule=st.sampled_from([1, 16, 32, 64, 192]),
)
def test_rows_are_shared_out_whole_and_in_proportion(
    n_rows: int, weights: list[int], granule: int
) -> None:
    begins = _core.split_rows_over_nodes(n_rows, weights, granule)
    assert begins[0] == 0
    assert begins[-1] == n_rows
    for i, weight in enumerate(weights):
        n = begins[i + 1] - begins[i]
        assert n >= 0
        assert begins[i] % granule == 0 or begins[i] == n_rows
        # The ends are rounded by half a granule, and the last granule may be cut.
        assert abs(n - n_rows * weight / sum(weights)) <= 2 * granule


def test_weights_may_be_bytes() -> None:
    terabyte = 1 << 40
    assert _core.split_rows_over_nodes(1 << 30, [3 * terabyte, terabyte], 64) == [
        0,
        3 << 28,
        1 << 30,
    ]


@pytest.mark.parametrize(
    ("n_rows", "weights", "granule"), [(-1, [1], 1), (8, [], 1), (8, [0], 1), (8, [2, -1], 1)]
)
def test_no_split_without_weights(n_rows: int, weights: list[int], granule: int) -> None:
    with pytest.raises(ShapeError, match="split over nodes"):
        _core.split_rows_over_nodes(n_rows, weights, granule)


@pytest.mark.parametrize("policy", ["bind", "prefer", "interleave"])
def test_memory_lies_on_its_node_once_it_is_touched(policy: str) -> None:
    memory = _core.NodeMemory(5 * PAGE + 1, [0], policy, huge_pages=False)
    view = np.asarray(memory)
    assert view.shape == (5 * PAGE + 1,)
    placed(memory)
    view[: 2 * PAGE] = 7
    if memory.bound:
        assert placed(memory) == {0: 2, -1: 4}
        assert _core.move_strays(memory, [0]) == 0
    else:
        assert "bound" in memory.note
    assert not view[2 * PAGE :].any()


def test_memory_without_a_node_says_where_it_lies() -> None:
    memory = _core.NodeMemory(PAGE, [], "bind")
    assert not memory.bound
    assert "first touched" in memory.note


def test_pages_of_a_part_and_at_steps() -> None:
    memory = _core.NodeMemory(64 * PAGE, [], "bind", huge_pages=False)
    np.asarray(memory)[:] = 1
    placed(memory)
    assert sum(_core.pages_by_node(memory, PAGE - 1, 2).values()) == 2
    assert sum(_core.pages_by_node(memory, step_bytes=16 * PAGE).values()) == 4
    with pytest.raises(ShapeError, match="of a buffer of"):
        _core.pages_by_node(memory, 0, 64 * PAGE + 1)


def test_empty_memory() -> None:
    memory = _core.NodeMemory(0, [0], "bind")
    assert np.asarray(memory).size == 0


def test_refusals() -> None:
    with pytest.raises(UnsupportedError, match="accepted are bind"):
        _core.NodeMemory(PAGE, [0], "somewhere")
    with pytest.raises(DeviceError, match="node 99999 does not exist"):
        _core.NodeMemory(PAGE, [99999], "bind")
    with pytest.raises(DeviceError, match="no node"):
        _core.move_strays(_core.NodeMemory(PAGE, [], "bind"), [])
