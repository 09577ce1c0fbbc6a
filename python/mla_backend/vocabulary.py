"""The token table of a GGUF file: what each id is, and the bytes it stands for.

In byte-level BPE every token is written in an alphabet of 256 characters, one per byte; control and
user-defined tokens are written as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import IntEnum
from functools import cached_property
from typing import Any

import numpy as np

from .errors import TokenizerError

PREFIX = "tokenizer.ggml."
ROLES = ("bos", "eos", "eot", "eom", "padding")


class TokenType(IntEnum):
    """``tokenizer.ggml.token_type`` as GGUF numbers it."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


# Texts that end an answer. Files name one or two of them by id; models emit the others as well.
END_TEXTS = frozenset(
    {
        "<｜end▁of▁sentence｜>",
        "<|EOT|>",
        "<|im_end|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|end_of_text|>",
        "<|endoftext|>",
        "[EOS]",
        "[EOT]",
    }
)

# GGUF files mark every added token of DeepSeek as control, but those that structure a text (roles,
# tool calls, fill-in-the-middle) are not "special" for the publisher: skipping them would glue the
# turns of a conversation together.
_STRUCTURE_TEXTS = frozenset({"<｜User｜>", "<｜Assistant｜>", "<｜completion｜>"})
_STRUCTURE_PREFIXES = ("<｜tool▁", "<｜fim▁")

_AS_WRITTEN = frozenset({TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN})


def byte_alphabet() -> dict[str, int]:
    """The 256 characters of byte-level BPE and the byte that each stands for.

    Printable Latin-1 characters stand for themselves; the other bytes, in order, are written as
    the characters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(printable)]
    table = {chr(b): b for b in printable}
    table.update({chr(0x100 + i): b for i, b in enumerate(others)})
    return table


BYTE_OF = byte_alphabet()


class Vocabulary:
    """Texts, types and roles of all ids.

    Attributes:
        size: number of ids, padding included; ids are ``0 .. size - 1``.
        types: :class:`TokenType` of every id, int32 [size].
        roles: ids by role, for those of :data:`ROLES` that the file names.
    """

    def __init__(
        self,
        tokens: Sequence[str],
        types: Sequence[int] | np.ndarray[Any, Any] | None = None,
        roles: Mapping[str, int] | None = None,
    ) -> None:
        """Keep the tables; ``types`` None means that all are normal.

        Raises:
            TokenizerError: the tables do not fit each other.
        """
        self._tokens = tokens
        self.size = len(tokens)
        if types is not None and len(types) != self.size:
            raise TokenizerError(f"tokenizer: {self.size} tokens, but {len(types)} token types")
        self.types: np.ndarray[Any, np.dtype[np.int32]] = (
            np.full(self.size, TokenType.NORMAL, np.int32)
            if types is None
            else np.asarray(types, np.int32)
        )
        self.roles = dict(roles or {})
        for role, token_id in self.roles.items():
            if not 0 <= token_id < self.size:
                raise TokenizerError(
                    f"tokenizer: {PREFIX}{role}_token_id is {token_id}, "
                    f"but ids are 0 .. {self.size - 1}"
                )

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, object]) -> Vocabulary:
        """Take the table out of a GGUF file's metadata.

        Raises:
            TokenizerError: a key has the wrong type or does not fit the others.
        """
        roles = {role: read_integer(metadata, f"{role}_token_id") for role in ROLES}
        return cls(
            read_strings(metadata, "tokens"),
            read_integers(metadata, "token_type"),
            {role: token_id for role, token_id in roles.items() if token_id is not None},
        )

    def checked_id(self, token_id: int) -> int:
        """The id as an int.

        Raises:
            TokenizerError: it is out of range.
        """
        index = int(token_id)
        if not 0 <= index < self.size:
            raise TokenizerError(f"token id {index} is out of range: 0 .. {self.size - 1}")
        return index

    def text(self, index: int) -> str:
        """The token as the file writes it."""
        return as_text(self._tokens[index])

    def bytes_of(self, token_id: int) -> bytes:
        """Bytes that an id stands for; not always valid UTF-8, empty for unused ids.

        Raises:
            TokenizerError: the id is out of range, or marked as a byte and not written as one.
        """
        index = self.checked_id(token_id)
        kind = int(self.types[index])
        if kind == TokenType.UNUSED:
            return b""
        text = self.text(index)
        if kind == TokenType.BYTE:
            return _byte_token(text)
        if kind in _AS_WRITTEN:
            return text.encode("utf-8", "replace")
        try:
            return bytes(map(BYTE_OF.__getitem__, text))
        except KeyError:  # not written in the byte alphabet, so it stands for itself
            return text.encode("utf-8", "replace")

    def ids_of(self, kind: TokenType) -> list[int]:
        """Ids of a type that have a text."""
        return [int(i) for i in np.flatnonzero(self.types == kind) if self.text(int(i))]

    def to_ids(self) -> dict[str, int]:
        """Id of every text, without unused ids."""
        unused = set(np.flatnonzero(self.types == TokenType.UNUSED).tolist())
        texts = map(as_text, self._tokens)
        return {text: i for i, text in enumerate(texts) if i not in unused}

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """Ids that end an answer: EOS, EOT, EOM and the well-known end texts."""
        named = {self.roles[role] for role in ("eos", "eot", "eom") if role in self.roles}
        added = self.ids_of(TokenType.CONTROL) + self.ids_of(TokenType.USER_DEFINED)
        return frozenset(named | {i for i in added if self.text(i) in END_TEXTS})

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Control ids, except those that structure a text."""
        return frozenset(
            i for i in self.ids_of(TokenType.CONTROL) if not _is_structure(self.text(i))
        )


def _is_structure(text: str) -> bool:
    return text in _STRUCTURE_TEXTS or text.startswith(_STRUCTURE_PREFIXES)


def _byte_token(text: str) -> bytes:
    """``<0x0A>`` to its byte."""
    try:
        if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            return bytes([int(text[3:5], 16)])
    except ValueError:
        pass
    raise TokenizerError(f"tokenizer: {text!r} is marked as a byte token; expected '<0x0A>'")


def as_text(value: object) -> str:
    """A metadata string, which readers give as str or bytes.

    Raises:
        TokenizerError: it is neither.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    raise TokenizerError(f"tokenizer: got {type(value).__name__} where a string was expected")


def read_text(metadata: Mapping[str, object], key: str) -> str:
    """A string of the tokenizer's metadata, empty where it is missing."""
    return as_text(metadata.get(PREFIX + key, ""))


def read_strings(metadata: Mapping[str, object], key: str) -> Sequence[str]:
    """An array of strings, empty where it is missing."""
    value: Any = metadata.get(PREFIX + key, ())
    if isinstance(value, (str, bytes)) or not hasattr(value, "__len__"):
        raise TokenizerError(f"tokenizer: {PREFIX}{key} is no array of strings")
    strings: Sequence[str] = value.tolist() if isinstance(value, np.ndarray) else value
    return strings


def read_integers(metadata: Mapping[str, object], key: str) -> np.ndarray[Any, Any] | None:
    """An array of integers, [n], or None where it is missing."""
    value = metadata.get(PREFIX + key)
    if value is None:
        return None
    array = np.asarray(value)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise TokenizerError(f"tokenizer: {PREFIX}{key} is no array of integers")
    return array


def read_integer(metadata: Mapping[str, object], key: str) -> int | None:
    """An integer, or None where it is missing."""
    value = metadata.get(PREFIX + key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TokenizerError(f"tokenizer: {PREFIX}{key} is {value!r}; expected an integer")
    return int(value)


def read_flag(metadata: Mapping[str, object], key: str) -> bool | None:
    """A boolean, or None where it is missing."""
    value = metadata.get(PREFIX + key)
    if value is None:
        return None
    if not isinstance(value, (bool, np.bool_)):
        raise TokenizerError(f"tokenizer: {PREFIX}{key} is {value!r}; expected true or false")
    return bool(value)
