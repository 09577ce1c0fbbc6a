"""The vocabulary of a checkpoint: a text and a type for every id, and the merges of its BPE.

Two publications of byte-level BPE are read: ``tokenizer.json``, and ``tiktoken.model``, which has
ranks instead of merges.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from ..vocabulary import BYTE_OF, TokenType

#: Added tokens that look like these are control tokens, whatever their flags say.
_LOOKS_SPECIAL: Final = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))
_SPECIAL_TEXTS: Final = ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
#: How sentencepiece writes a blank; files write user-defined tokens as they are in text.
_BLANK: Final = "\u2581"
#: Special ids that a tiktoken vocabulary has after its ranks; those without a text are reserved.
_TIKTOKEN_SPECIAL: Final = 256 + 2

_CHARACTER_OF: Final = {byte: character for character, byte in BYTE_OF.items()}


@dataclass(frozen=True)
class AddedToken:
    """A token beside those of the BPE."""

    text: str
    special: bool


@dataclass(frozen=True)
class Vocab:
    """Texts and types of all ids, and merges ``"left right"``, best first."""

    tokens: tuple[str, ...]
    types: tuple[int, ...]
    merges: tuple[str, ...]


def vocab_from_json(
    tokenizer: Mapping[str, Any],
    settings: Mapping[str, Any],
    n_vocab: int,
    problems: list[str],
) -> Vocab:
    """The vocabulary of a ``tokenizer.json``, padded to ``n_vocab`` ids.

    Args:
        tokenizer: the file.
        settings: ``tokenizer_config.json``, whose added tokens come in addition.
        problems: everything wrong is added here.
    """
    model = tokenizer.get("model")
    if not isinstance(model, Mapping) or model.get("type", "BPE") != "BPE":
        kind = model.get("type") if isinstance(model, Mapping) else model
        problems.append(f"tokenizer.json: model: found {kind!r}; accepted: 'BPE' (byte-level)")
        return Vocab((), (), ())
    table = model.get("vocab")
    if not isinstance(table, Mapping) or not all(type(index) is int for index in table.values()):
        problems.append("tokenizer.json: model.vocab: accepted: an object of tokens and ids")
        return Vocab((), (), ())
    texts = {index: text for text, index in table.items()}
    added = added_tokens(tokenizer, settings, problems)
    merges = _read_merges(model.get("merges"), problems)
    return _fill(texts, added, merges, n_vocab, problems)


def vocab_from_tiktoken(
    path: Path, settings: Mapping[str, Any], n_vocab: int, problems: list[str]
) -> Vocab:
    """The vocabulary of a ``tiktoken.model``: a line per token, its bytes in base64 and its rank.

    Its merges are not stored: the token of rank r was made by merging the two pieces that all
    merges of lower rank leave of it.
    """
    ranks = _read_ranks(path, problems)
    added = added_tokens({}, settings, problems)
    n_base = len(ranks)
    for index in range(n_base, min(n_base + _TIKTOKEN_SPECIAL, n_vocab)):
        text = added[index].text if index in added else f"<|reserved_token_{index}|>"
        added[index] = AddedToken(text, special=True)
    texts = {rank: _written(token) for token, rank in ranks.items()}
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        pair = _last_merge(token, rank, ranks)
        if len(pair) == 2:
            merges.append(f"{_written(pair[0])} {_written(pair[1])}")
    return _fill(texts, added, tuple(merges), n_vocab, problems)


def added_tokens(
    tokenizer: Mapping[str, Any], settings: Mapping[str, Any], problems: list[str]
) -> dict[int, AddedToken]:
    """Tokens beside those of the BPE by id, of both files; the settings' flags come last."""
    listed = tokenizer.get("added_tokens") or []
    decoder = settings.get("added_tokens_decoder") or {}
    found: dict[int, AddedToken] = {}
    try:
        entries = [(int(entry["id"]), entry) for entry in listed]
        entries += [(int(index), entry) for index, entry in decoder.items()]
        for index, entry in entries:
            token = AddedToken(str(entry["content"]), bool(entry.get("special", False)))
            if index in found and found[index].text != token.text:
                problems.append(
                    f"tokenizer_config.json: added token {index} is {token.text!r}, but "
                    f"{found[index].text!r} in tokenizer.json"
                )
            found[index] = token
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        problems.append(f"tokenizer: added tokens: accepted: objects with id and content ({error})")
    return found


def _fill(
    texts: Mapping[int, str],
    added: Mapping[int, AddedToken],
    merges: tuple[str, ...],
    n_vocab: int,
    problems: list[str],
) -> Vocab:
    highest = max((*texts, *added), default=-1)
    if highest >= n_vocab:
        problems.append(
            f"tokenizer: found id {highest}; accepted: below vocab_size {n_vocab} of config.json"
        )
    tokens, types = [], []
    for index in range(n_vocab):
        if index in added:
            text, kind = _classify(added[index])
        elif index in texts:
            text, kind = texts[index], TokenType.NORMAL
        else:
            text, kind = f"[PAD{index}]", TokenType.UNUSED
        tokens.append(text)
        types.append(int(kind))
    return Vocab(tuple(tokens), tuple(types), merges)


def _classify(token: AddedToken) -> tuple[str, TokenType]:
    text = token.text
    looks = any(text.startswith(first) and text.endswith(last) for first, last in _LOOKS_SPECIAL)
    if token.special or looks or text in _SPECIAL_TEXTS:
        return text, TokenType.CONTROL
    return text.replace(_BLANK, " "), TokenType.USER_DEFINED


def _read_merges(value: Any, problems: list[str]) -> tuple[str, ...]:
    """Merges as strings, or (newer files) as pairs, whose blanks are written as bytes then."""
    if isinstance(value, list):
        if all(isinstance(merge, str) for merge in value):
            return tuple(value)
        if all(isinstance(m, list) and len(m) == 2 and all(map(_is_text, m)) for m in value):
            blank = _CHARACTER_OF[ord(" ")]
            return tuple(" ".join(part.replace(" ", blank) for part in merge) for merge in value)
    problems.append("tokenizer.json: model.merges: accepted: a list of strings or of pairs")
    return ()


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _read_ranks(path: Path, problems: list[str]) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    try:
        for line in path.read_bytes().splitlines():
            if line:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
    except (OSError, ValueError, binascii.Error) as error:
        problems.append(f"{path.name}: accepted: lines of base64 and a rank ({error})")
    if sorted(ranks.values()) != list(range(len(ranks))):
        problems.append(f"{path.name}: accepted: every rank from 0 once")
    return ranks


def _written(token: bytes) -> str:
    """Bytes in the alphabet of byte-level BPE."""
    return "".join(map(_CHARACTER_OF.__getitem__, token))


def _last_merge(token: bytes, rank: int, ranks: Mapping[bytes, int]) -> list[bytes]:
    """The pieces that the merges of lower rank leave of a token: two, or one for single bytes."""
    pieces = [token[i : i + 1] for i in range(len(token))]
    while len(pieces) > 1:
        pairs = [ranks.get(a + b, rank) for a, b in pairwise(pieces)]
        best = min(pairs)
        if best >= rank:
            break
        at = pairs.index(best)
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    return pieces
