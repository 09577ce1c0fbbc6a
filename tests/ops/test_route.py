"""route against float64: the rules of V2-Lite, V2 and V3, ties, NaN, threads, messages."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mla_backend import ops
from mla_backend.errors import FormatError, ShapeError, UnsupportedError
from mla_backend.ops import Where
from reference.errors import assert_ulps
from reference.layouts import LAYOUTS, laid_out
from reference.route import route, scores

# The routers of the published models: experts, and the rule.
RULES: dict[str, tuple[int, dict[str, Any]]] = {
    "greedy": (64, {"n_used": 6, "gating": "softmax"}),
    "by max": (
        160,
        {"n_used": 6, "gating": "softmax", "n_groups": 8, "n_groups_used": 3, "scale": 16.0},
    ),
    "by two": (
        256,
        {
            "n_used": 8,
            "gating": "sigmoid",
            "n_groups": 8,
            "n_groups_used": 4,
            "group_score": "top2_sum",
            "normalize": True,
            "scale": 2.5,
        },
    ),
    "one group": (
        384,
        {"n_used": 8, "gating": "sigmoid", "normalize": True, "scale": 2.827},
    ),
    "all of five": (5, {"n_used": 5, "gating": "softmax", "normalize": True}),
    "one": (7, {"n_used": 1, "gating": "sigmoid"}),
}


def numbers(shape: tuple[int, ...], seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def check(got: tuple[Any, Any], logits: Any, bias: Any, rule: dict[str, Any]) -> None:
    """Same experts; and weights within the roundings of e^z, a sum and a quotient."""
    want_ids, want_weights = route(logits, bias, **rule)
    ids, weights = got
    assert ids.dtype == np.int32
    np.testing.assert_array_equal(ids, want_ids)
    largest = np.abs(logits).max(axis=1, keepdims=True, initial=0).astype(np.float64)
    ulps = np.broadcast_to(8 + 2 * largest, want_weights.shape)
    assert_ulps(np.ascontiguousarray(weights), want_weights, ulps)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("biased", [False, True])
def test_rules(where: Where, rule: str, biased: bool) -> None:
    n_experts, attrs = RULES[rule]
    logits = numbers((37, n_experts))
    bias = 0.1 * numbers((n_experts,), 1) if biased else None
    check(ops.route(logits, bias, **attrs, **where), logits, bias, attrs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(where: Where, layout: str) -> None:
    n_experts, attrs = RULES["by two"]
    logits = laid_out(numbers((3, n_experts)), layout)
    bias = laid_out(numbers((n_experts,), 1), layout)
    check(ops.route(logits, bias, **attrs, **where), logits, bias, attrs)


def test_bias_moves_the_choice_but_not_the_weight(where: Where) -> None:
    logits = np.array([[0, 1, 2, 3]], np.float32)
    bias = np.array([5, 0, 0, -5], np.float32)
    ids, weights = ops.route(logits, bias, n_used=2, gating="sigmoid", **where)
    assert ids.tolist() == [[0, 2]]
    np.testing.assert_allclose(weights, scores(logits, "sigmoid")[:, [0, 2]], rtol=1e-6)


def test_masked_groups_lose_even_to_negative_choices(where: Where) -> None:
    """All choices are negative: an expert outside the best group, taken as 0, would win."""
    logits = numbers((9, 8))
    bias = np.full(8, -3, np.float32)
    attrs: dict[str, Any] = {"n_used": 2, "gating": "sigmoid", "n_groups": 4, "n_groups_used": 1}
    for group_score in ("max", "top2_sum"):
        rule = {**attrs, "group_score": group_score}
        got = ops.route(logits, bias, **rule, **where)
        check(got, logits, bias, rule)
        assert (got[0] // 2 == got[0][:, :1] // 2).all()


def test_group_rules_differ(where: Where) -> None:
    """One strong expert wins by max, two good ones by the sum of two."""
    logits = np.array([[4, -9, 3, 3]], np.float32)
    attrs: dict[str, Any] = {"n_used": 2, "gating": "sigmoid", "n_groups": 2, "n_groups_used": 1}
    assert ops.route(logits, group_score="max", **attrs, **where)[0].tolist() == [[0, 1]]
    assert ops.route(logits, group_score="top2_sum", **attrs, **where)[0].tolist() == [[2, 3]]


def test_ties_go_to_the_lower_id(where: Where) -> None:
    logits = np.zeros((2, 33), np.float32)
    logits[1, [5, 20, 31]] = 1
    ids, _ = ops.route(logits, n_used=4, **where)
    assert ids.tolist() == [[0, 1, 2, 3], [5, 20, 31, 0]]
    grouped, _ = ops.route(logits[:1, :32], n_used=4, n_groups=4, n_groups_used=2, **where)
    assert grouped.tolist() == [[0, 1, 2, 3]]
    # -0 and 0 are the same choice
    bias = np.array([-0.5, -0.5, 0.5, -0.5], np.float32)
    even, _ = ops.route(np.zeros((1, 4), np.float32), bias, n_used=4, gating="sigmoid", **where)
    assert even.tolist() == [[2, 0, 1, 3]]


@pytest.mark.parametrize("group_score", ["max", "top2_sum"])
def test_nan_and_infinities_come_last_or_first(where: Where, group_score: Any) -> None:
    logits = np.array([[np.nan, -np.inf, 1, np.inf, 0, np.nan]], np.float32)
    ids, weights = ops.route(logits, n_used=6, gating="sigmoid", **where)
    assert ids.tolist() == [[3, 2, 4, 1, 0, 5]]
    assert np.isnan(weights[0]).tolist() == [False] * 4 + [True] * 2
    grouped, _ = ops.route(
        logits,
        n_used=2,
        gating="sigmoid",
        n_groups=3,
        n_groups_used=1,
        group_score=group_score,
        **where,
    )
    assert grouped.tolist() == [[3, 2]]
    broken, _ = ops.route(np.full((2, 8), np.nan, np.float32), n_used=3, **where)
    assert broken.tolist() == [[0, 1, 2]] * 2


def test_normalizing_nothing_gives_zeros(where: Where) -> None:
    """Scores that underflow: the sum's 1e-20 keeps the division finite."""
    logits = np.full((1, 4), -200, np.float32)
    _, weights = ops.route(logits, n_used=2, gating="sigmoid", normalize=True, **where)
    assert not weights.any()


def test_empty(where: Where) -> None:
    ids, weights = ops.route(np.zeros((0, 8), np.float32), n_used=2, **where)
    assert ids.shape == weights.shape == (0, 2)


def test_threads_change_nothing(isa: str) -> None:
    n_experts, attrs = RULES["by two"]
    logits = numbers((400, n_experts))
    results = [
        b"".join(part.tobytes() for part in ops.route(logits, **attrs, isa=isa, threads=n))
        for n in (1, 2, 5)
    ]
    assert results[0] == results[1] == results[2]


@settings(max_examples=40, deadline=None)
@given(
    isa=st.sampled_from(ops.available_isas()),
    n_groups=st.integers(1, 6),
    per_group=st.integers(2, 20),
    data=st.data(),
    seed=st.integers(0, 2**32),
)
def test_property(isa: str, n_groups: int, per_group: int, data: st.DataObject, seed: int) -> None:
    used = data.draw(st.integers(1, n_groups))
    attrs: dict[str, Any] = {
        "n_used": data.draw(st.integers(1, per_group * used)),
        "gating": data.draw(st.sampled_from(["softmax", "sigmoid"])),
        "n_groups": n_groups,
        "n_groups_used": used,
        "group_score": data.draw(st.sampled_from(["max", "top2_sum"])),
        "normalize": data.draw(st.booleans()),
        "scale": 2.5,
    }
    # Logits on a grid, shuffled: every score is far from its neighbours, equal ones are equal.
    rng = np.random.default_rng(seed)
    grid = np.linspace(-4, 4, n_groups * per_group, dtype=np.float32)
    logits = np.stack([rng.permutation(grid) for _ in range(3)])
    check(ops.route(logits, **attrs, isa=isa, threads=1), logits, None, attrs)


def test_messages() -> None:
    logits = numbers((2, 8))
    with pytest.raises(ShapeError, match="route: 3 groups do not divide 8 experts"):
        ops.route(logits, n_used=1, n_groups=3)
    with pytest.raises(ShapeError, match="route: 5 groups used, accepted is 1 to 4"):
        ops.route(logits, n_used=1, n_groups=4, n_groups_used=5)
    with pytest.raises(ShapeError, match="route: 5 experts a token, accepted is 1 to 4"):
        ops.route(logits, n_used=5, n_groups=4, n_groups_used=2)
    with pytest.raises(ShapeError, match="no top-2 sum"):
        ops.route(logits, n_used=1, n_groups=8, n_groups_used=2, group_score="top2_sum")
    with pytest.raises(ShapeError, match=r"bias F32 \[7\] must be \[8\]"):
        ops.route(logits, numbers((7,)), n_used=1)
    with pytest.raises(FormatError, match=r"logits is F16 \[2, 8\], accepted is F32"):
        ops.route(logits.astype(np.float16), n_used=1)
    with pytest.raises(UnsupportedError, match="gating 'tanh', accepted is softmax or sigmoid"):
        ops.route(logits, n_used=1, gating="tanh")  # type: ignore[arg-type]
