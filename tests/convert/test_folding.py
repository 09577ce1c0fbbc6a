"""Lists of texts that differ in numbers between dots."""

from __future__ import annotations

from mla_backend.convert.folding import folded


def test_layers_become_ranges() -> None:
    names = [f"blk.{layer}.ffn_up.weight" for layer in (0, 1, 2, 5)]
    assert folded(["a.weight", *names, "b"]) == ["a.weight", "blk.{0-2,5}.ffn_up.weight", "b"]


def test_single_texts_stay_as_they_are() -> None:
    texts = ["blk.3.ffn_up.weight", "no numbers", "of 2 files", "x.7.y [7, 8]"]
    assert folded(texts) == texts
    assert folded([]) == []


def test_two_places_are_combined() -> None:
    texts = [f"l.{layer}.e.{expert}.w: missing" for layer in range(3) for expert in range(4)]
    assert folded(texts) == ["l.{0-2}.e.{0-3}.w: missing"]
    assert folded(texts[:-1]) == ["l.{0-2}.e.{0-3}.w: missing (11 of these)"]


def test_repetitions_count_once() -> None:
    assert folded(["l.1.w", "l.1.w"]) == ["l.1.w"]
