"""Tokenizer: vectors of the reference models, a small hand-made BPE, streams, and bad input."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mla_backend.errors import TokenizerError
from mla_backend.pretokenizers import PRE_TOKENIZERS
from mla_backend.tokenizer import Tokenizer
from mla_backend.vocabulary import TokenType, byte_alphabet

FIXTURES = os.environ.get("MLA_FIXTURES", "")
BOS, EOS, USER, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "[PAD9]"
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "o r", "Ġw or", "l d", "Ġwor ld"]


def make_metadata(**changes: object) -> dict[str, object]:
    """A byte-level BPE with a few merges, two framing tokens, a role, a tag and one padding id."""
    tokens = [*byte_alphabet(), *(m.replace(" ", "") for m in MERGES), "é́"]
    extra = [(BOS, 3), (EOS, 3), (USER, 3), ("<think>", 4), (PAD, 5), ("<0x0A>", 6)]
    first = len(tokens)
    metadata: dict[str, object] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "deepseek-v3",
        "tokenizer.ggml.tokens": tokens + [text for text, _ in extra],
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.token_type": np.array([1] * first + [t for _, t in extra], np.int32),
        "tokenizer.ggml.bos_token_id": first,
        "tokenizer.ggml.eos_token_id": first + 1,
        "tokenizer.ggml.add_bos_token": True,
    }
    for key, value in changes.items():
        name = f"tokenizer.ggml.{key}"
        metadata.pop(name, None)
        if value is not None:
            metadata[name] = value
    return metadata


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_metadata(make_metadata())


def id_of(text: str) -> int:
    tokens = make_metadata()["tokenizer.ggml.tokens"]
    assert isinstance(tokens, list)
    return int(tokens.index(text))


# ---- the reference models


def reference(model: str) -> tuple[Tokenizer, dict[str, Any]]:
    if not FIXTURES:
        pytest.skip("needs the reference models: set MLA_FIXTURES")
    from mla_backend.gguf import read_gguf

    folder = Path(FIXTURES) / model
    path = min((folder / "gguf").glob("*.gguf"), key=lambda p: p.stat().st_size)
    vectors = json.loads((folder / "expected" / "tokenizer.json").read_text("utf-8"))
    return Tokenizer.from_metadata(read_gguf(path).metadata), vectors


@pytest.mark.parametrize("model", ["tiny-v2", "tiny-v3"])
def test_reference_vectors(model: str) -> None:
    tokenizer, vectors = reference(model)
    assert tokenizer.bos_id == vectors["bos_token_id"]
    assert tokenizer.eos_id == vectors["eos_token_id"]
    assert tokenizer.add_bos == vectors["add_bos_token"]
    for case in vectors["encode"]:
        ids = case["ids"]
        assert tokenizer.encode(case["text"], add_bos=False) == ids
        assert tokenizer.encode(case["text"]) == [tokenizer.bos_id, *ids]
        assert tokenizer.decode(ids) == case["decoded"]
        assert tokenizer.decode(ids, skip_special=True) == case["decoded_skip_special"]
        decoder = tokenizer.stream_decoder()
        assert "".join(map(decoder.push, ids)) + decoder.flush() == case["decoded"]
    for case in vectors["chat"]:
        assert tokenizer.encode(case["text"], add_bos=False) == case["ids"]


@pytest.mark.parametrize("model", ["tiny-v2", "tiny-v3"])
def test_reference_padding_ids_decode_to_nothing(model: str) -> None:
    tokenizer, _ = reference(model)
    assert tokenizer.vocab_size == 1024
    assert tokenizer.decode(range(1016, 1024)) == ""


# ---- encoding


def test_merges_and_bos(tokenizer: Tokenizer) -> None:
    hello, world = id_of("hello"), id_of("Ġworld")
    assert tokenizer.encode("hello world") == [tokenizer.bos_id, hello, world]
    assert tokenizer.encode("hello world", add_bos=False) == [hello, world]
    assert tokenizer.encode("", add_bos=False) == []


@pytest.mark.parametrize(
    ("pre", "in_file", "expected"),
    [
        ("deepseek-llm", None, True),
        ("deepseek-llm", False, False),
        ("gpt-2", None, False),
        ("gpt-2", True, True),
    ],
)
def test_default_bos(pre: str, in_file: bool | None, expected: bool) -> None:
    tokenizer = Tokenizer.from_metadata(make_metadata(pre=pre, add_bos_token=in_file))
    assert tokenizer.add_bos is expected
    assert (tokenizer.encode("x")[0] == tokenizer.bos_id) is expected


def test_bos_that_the_file_lacks() -> None:
    tokenizer = Tokenizer.from_metadata(make_metadata(bos_token_id=None))
    assert tokenizer.bos_id is None
    assert tokenizer.bos_token == ""
    with pytest.raises(TokenizerError, match="add_bos=False"):
        tokenizer.encode("x")
    assert tokenizer.encode("x", add_bos=False) == [id_of("x")]


def test_special_text(tokenizer: Tokenizer) -> None:
    text = f"{USER}hello<think>"
    parsed = tokenizer.encode(text, add_bos=False)
    assert parsed == [id_of(USER), id_of("hello"), id_of("<think>")]
    plain = tokenizer.encode(text, add_bos=False, parse_special=False)
    assert id_of(USER) not in plain
    assert plain[-1] == id_of("<think>")  # user-defined tokens are always recognized
    assert tokenizer.decode(plain) == text
    assert tokenizer.encode(PAD, add_bos=False)[0] == id_of("[")  # an unused id is never produced


def test_lone_surrogate(tokenizer: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match=r"U\+DC80 at position 2"):
        tokenizer.encode("ab\udc80")


def test_byte_without_a_token() -> None:
    metadata = make_metadata()
    tokens = metadata["tokenizer.ggml.tokens"]
    assert isinstance(tokens, list)
    tokens[tokens.index("q")] = "qq"
    tokenizer = Tokenizer.from_metadata(metadata)
    assert tokenizer.encode("hello", add_bos=False) == [id_of("hello")]
    with pytest.raises(TokenizerError, match="0x71"):
        tokenizer.encode("quiz")


def test_ignore_merges_takes_whole_pieces() -> None:
    tokens = [*byte_alphabet(), "word"]
    metadata = {"tokens": tokens, "merges": [], "bos_token_id": None, "add_bos_token": None}
    for pre, expected in [("tekken", [256]), ("gpt-4o", [tokens.index(c) for c in "word"])]:
        changes = {**metadata, "pre": pre, "token_type": None, "eos_token_id": None}
        tokenizer = Tokenizer.from_metadata(make_metadata(**changes))
        assert tokenizer.encode("word", add_bos=False) == expected


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("deepseek-llm", ["Hello", " camelCase", "你好", "abc", "1234", " don", "'", "t", "\n"]),
        ("deepseek-coder", ["Hello", " camelCase", "你好", "abc", *"1234", " don", "'", "t", "\n"]),
        ("deepseek-v3", ["Hello", " camelCase", "你好", "abc", "123", "4", " don", "'t", "\n"]),
        ("kimi-k2", ["Hello", " camel", "Case", "你好", "abc", "123", "4", " don't", "\n"]),
        ("gpt-4o", ["Hello", " camel", "Case你好abc", "123", "4", " don't", "\n"]),
        ("tekken", ["Hello", " camel", "Case你好abc", *"1234", " don", "'t", "\n"]),
        ("glm4", ["Hello", " camelCase你好abc", "123", "4", " don", "'t", "\n"]),
        ("gpt-2", ["Hello", " camelCase你好abc", "1234", " don", "'t", "\n"]),
    ],
)
def test_pre_tokenizers_cut(pre: str, pieces: list[str]) -> None:
    from tokenizers import Regex, pre_tokenizers

    cut = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r), "isolated") for r in PRE_TOKENIZERS[pre].regexes]
    )
    assert [piece for piece, _ in cut.pre_tokenize_str("".join(pieces))] == pieces


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
@given(text=st.text(max_size=40))
@settings(max_examples=40, deadline=None)
def test_decode_inverts_encode(pre: str, text: str) -> None:
    tokenizer = ROUND_TRIP.setdefault(pre, Tokenizer.from_metadata(make_metadata(pre=pre)))
    ids = tokenizer.encode(text, add_bos=False)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(tokenizer.encode(text, parse_special=False), skip_special=True) == text


ROUND_TRIP: dict[str, Tokenizer] = {}


# ---- decoding


def test_token_bytes(tokenizer: Tokenizer) -> None:
    assert tokenizer.token_bytes(id_of("Ġworld")) == b" world"
    assert tokenizer.token_bytes(id_of("ã")) == b"\xe3"
    assert tokenizer.token_bytes(id_of("é́")) == "é́".encode()  # outside the byte alphabet
    assert tokenizer.token_bytes(id_of("<think>")) == b"<think>"
    assert tokenizer.token_bytes(id_of("<0x0A>")) == b"\n"
    assert tokenizer.token_bytes(id_of(PAD)) == b""


def test_skip_special_keeps_structure(tokenizer: Tokenizer) -> None:
    ids = [id_of(BOS), id_of(USER), id_of("hello"), id_of("<think>"), id_of(EOS)]
    assert tokenizer.decode(ids) == f"{BOS}{USER}hello<think>{EOS}"
    assert tokenizer.decode(ids, skip_special=True) == f"{USER}hello<think>"
    decoder = tokenizer.stream_decoder(skip_special=True)
    assert "".join(map(decoder.push, ids)) == f"{USER}hello<think>"
    assert tokenizer.is_control(id_of(USER))
    assert not tokenizer.is_control(id_of("<think>"))


@pytest.mark.parametrize("bad", [-1, 10**6, 2**40])
def test_ids_out_of_range(tokenizer: Tokenizer, bad: int) -> None:
    last = tokenizer.vocab_size - 1
    for call in (tokenizer.token_bytes, tokenizer.stream_decoder().push, tokenizer.is_control):
        with pytest.raises(TokenizerError, match=rf"{bad} is out of range: 0 \.\. {last}"):
            call(bad)
    with pytest.raises(TokenizerError, match="out of range"):
        tokenizer.decode([0, bad])


def test_numpy_ids(tokenizer: Tokenizer) -> None:
    ids = np.array(tokenizer.encode("hello world", add_bos=False), np.int64)
    assert tokenizer.decode(ids) == "hello world"
    assert tokenizer.token_bytes(ids[0]) == b"hello"


def test_stream_holds_back_broken_utf8(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a😀b", add_bos=False)
    decoder = tokenizer.stream_decoder()
    assert [decoder.push(i) for i in ids] == ["a", "", "", "", "😀", "b"]
    assert decoder.flush() == ""


def test_stream_replaces_what_cannot_complete(tokenizer: Tokenizer) -> None:
    alphabet = {byte: char for char, byte in byte_alphabet().items()}
    decoder = tokenizer.stream_decoder()
    assert decoder.push(id_of(alphabet[0xE4])) == ""
    assert decoder.push(id_of("a")) == "\ufffda"
    assert decoder.push(id_of(alphabet[0xFF])) == "\ufffd"
    assert decoder.push(id_of(alphabet[0xF0])) == ""
    assert decoder.flush() == "\ufffd"
    assert decoder.flush() == ""


@given(ids=st.lists(st.integers(0, 271), max_size=30))
@settings(deadline=None)
def test_stream_pieces_join_to_decode(tokenizer: Tokenizer, ids: list[int]) -> None:
    decoder = tokenizer.stream_decoder()
    pieces = [decoder.push(i) for i in ids]
    assert "".join(pieces) + decoder.flush() == tokenizer.decode(ids)


# ---- roles and metadata


def test_end_ids() -> None:
    metadata = make_metadata(eot_token_id=id_of("<think>"))
    types = metadata["tokenizer.ggml.token_type"]
    tokens = metadata["tokenizer.ggml.tokens"]
    assert isinstance(types, np.ndarray)
    assert isinstance(tokens, list)
    tokens[id_of(USER)] = "<|im_end|>"
    tokens[id_of("hello")] = "<|EOT|>"  # a normal token, which no model emits as an end
    tokenizer = Tokenizer.from_metadata(metadata)
    assert tokenizer.eos_ids == {id_of(EOS), id_of("<think>"), id_of(USER)}
    assert tokenizer.eos_token == EOS


def test_arrays_may_be_numpy(tokenizer: Tokenizer) -> None:
    metadata = make_metadata()
    for key in ("tokens", "merges"):
        metadata[f"tokenizer.ggml.{key}"] = np.array(metadata[f"tokenizer.ggml.{key}"], object)
    text = f"{USER}hello world 😀"
    assert Tokenizer.from_metadata(metadata).encode(text) == tokenizer.encode(text)


def test_unknown_pre_tokenizer_still_decodes() -> None:
    tokenizer = Tokenizer.from_metadata(make_metadata(pre="from-the-future"))
    assert tokenizer.decode([id_of("hello")]) == "hello"
    with pytest.raises(TokenizerError, match=r"'from-the-future'; known are deepseek-llm, .*kimi"):
        tokenizer.encode("hello", add_bos=False)
    missing = Tokenizer.from_metadata(make_metadata(pre=None))
    with pytest.raises(TokenizerError, match="pre is missing"):
        missing.encode("hello", add_bos=False)


@pytest.mark.parametrize(("model", "shown"), [("llama", "'llama'"), (None, "missing")])
def test_unknown_kind_of_tokenizer(model: str | None, shown: str) -> None:
    tokenizer = Tokenizer.from_metadata(make_metadata(model=model))
    assert tokenizer.vocab_size == len(byte_alphabet()) + len(MERGES) + 7
    with pytest.raises(TokenizerError, match=shown):
        tokenizer.encode("x")
    with pytest.raises(TokenizerError, match=shown):
        tokenizer.decode([1])


def test_file_without_a_tokenizer() -> None:
    tokenizer = Tokenizer.from_metadata({})
    assert tokenizer.vocab_size == 0
    assert tokenizer.eos_ids == frozenset()
    with pytest.raises(TokenizerError, match="missing"):
        tokenizer.encode("x")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_type": np.ones(3, np.int32)}, "3 token types"),
        ({"token_type": ["a"] * 272}, "no array of integers"),
        ({"bos_token_id": 272}, r"bos_token_id is 272, but ids are 0 \.\. 271"),
        ({"eos_token_id": -1}, "eos_token_id is -1"),
        ({"eos_token_id": "1"}, "expected an integer"),
        ({"tokens": "abc"}, "no array of strings"),
        ({"tokens": 7}, "no array of strings"),
        ({"add_bos_token": 1}, "expected true or false"),
        ({"pre": 3}, "int where a string"),
    ],
)
def test_bad_metadata(changes: dict[str, object], message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_metadata(make_metadata(**changes))


@pytest.mark.parametrize(
    ("merges", "message"),
    [(["he"], "expected 'left right'"), ([" x"], "expected"), (["h zzz"], "zzz"), ([3], "int")],
)
def test_bad_merges(merges: list[Any], message: str) -> None:
    tokenizer = Tokenizer.from_metadata(make_metadata(merges=merges))
    with pytest.raises(TokenizerError, match=message):
        tokenizer.encode("x")


def test_bad_byte_token() -> None:
    metadata = make_metadata()
    tokens = metadata["tokenizer.ggml.tokens"]
    assert isinstance(tokens, list)
    tokens[-1] = "<0xZZ>"
    with pytest.raises(TokenizerError, match="byte token"):
        Tokenizer.from_metadata(metadata).decode([len(tokens) - 1])


def test_large_vocabulary_builds_quickly() -> None:
    """The limit is wide, for busy machines: 0.3 s was measured on two cores."""
    letters = list(byte_alphabet())
    pairs = [(a, b) for a in letters for b in letters]
    pairs += [(a + b, letters[0]) for a, b in pairs[: 128_000 - len(letters) - len(pairs)]]
    tokens = letters + [a + b for a, b in pairs]
    merges = [f"{a} {b}" for a, b in pairs]
    specials = [f"<｜place▁holder▁no▁{i}｜>" for i in range(800)]
    types = [TokenType.NORMAL] * len(tokens) + [TokenType.CONTROL] * len(specials)
    metadata = make_metadata(tokens=tokens + specials, merges=merges, token_type=types)
    start = time.perf_counter()
    tokenizer = Tokenizer.from_metadata(metadata)
    assert time.perf_counter() - start < 0.2
    tokenizer.encode("hello", add_bos=False)
    assert time.perf_counter() - start < 2.0
