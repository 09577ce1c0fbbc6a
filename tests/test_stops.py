"""Stop strings in streamed text, however it is cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mla_backend.stops import StopScanner


def scan(pieces: list[str], stops: list[str]) -> tuple[str, str | None]:
    scanner = StopScanner(stops)
    passed = "".join(scanner.push(piece) for piece in pieces)
    return passed + scanner.flush(), scanner.found


@pytest.mark.parametrize(
    ("pieces", "stops", "want"),
    [
        (["one STOP two"], ["STOP"], ("one ", "STOP")),
        (["one S", "T", "OP two"], ["STOP"], ("one ", "STOP")),
        (["one STO", "ne"], ["STOP"], ("one STOne", None)),
        (["one ST"], ["STOP"], ("one ST", None)),
        (["aab"], ["ab"], ("a", "ab")),
        (["aaa", "ab"], ["aab"], ("aa", "aab")),
        (["abc"], ["c", "b"], ("a", "b")),
        (["STOP"], ["STOP"], ("", "STOP")),
        (["text"], [], ("text", None)),
        (["text"], [""], ("text", None)),
        (["日", "本", "語"], ["本語"], ("日", "本語")),
    ],
)
def test_examples(pieces: list[str], stops: list[str], want: tuple[str, str | None]) -> None:
    assert scan(pieces, stops) == want


def test_holds_back_what_may_be_a_start() -> None:
    scanner = StopScanner(["\n\n", "User:"])
    assert scanner.push("Hello Us") == "Hello "
    assert scanner.push("ual\n") == "Usual"
    assert scanner.push("x") == "\nx"
    assert scanner.push("User") == ""
    assert scanner.push(": hi") == ""
    assert scanner.found == "User:"
    assert scanner.push("more") == ""
    assert scanner.flush() == ""


@given(
    st.lists(st.text("ab", max_size=4), max_size=8),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
)
def test_cuts_do_not_matter(pieces: list[str], stops: list[str]) -> None:
    """One character at a time, the stop string that is complete first ends the text."""
    text = "".join(pieces)
    want, found = scan(list(text), stops)
    passed, hit = scan(pieces, stops)
    assert (hit is None) == (found is None)
    assert text.startswith(passed)
    if hit is None:
        assert passed == text == want
    else:
        assert text[len(passed) :].startswith(hit)
        assert not any(stop in passed for stop in stops)
