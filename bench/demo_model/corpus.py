"""The text: the standard library's source and the documentation's reST, split by path.

A file belongs to the held-out text by a hash of its path, so the split depends on no seed and all
versions of one module fall on the same side.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

HELD_OUT_PER_MILLE = 40

_SKIPPED_DIRS = {
    "__pycache__", "_bundled", "idle_test", "lib-dynload", "pydoc_data", "site-packages", "test",
    "tests",
}  # fmt: skip
_SKIPPED_NAMES = re.compile(
    r"^(_sysconfigdata.*|entities|keycert|schema|sequence|_opcode_metadata|stringprep)\.py$"
)
# Tables that programs wrote: code pages, and whatever else consists of numbers.
_CODE_PAGE = re.compile(r"^(decoding_table|decoding_map|encoding_map)\b", re.MULTILINE)
_MOST_DIGITS = 0.12
# Lines shorter than this (brackets, "return None") are shared by unrelated files.
_SHORT_LINE = 20
_MOST_SEEN_LINES = 0.5


@dataclass(frozen=True)
class Document:
    """One file.

    Attributes:
        name: ``Lib/...`` or ``Doc/...``, without the version.
        text: its whole text.
        held_out: whether it is kept from training.
    """

    name: str
    text: str
    held_out: bool


def is_held_out(name: str) -> bool:
    """Whether the file of that name is kept from training."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % 1000 < HELD_OUT_PER_MILLE


def collect(libraries: Sequence[Path], docs: Path) -> list[Document]:
    """The corpus, held-out files first, then by version and name.

    Args:
        libraries: folders of the standard library, the preferred version first. Of the others
            only files are taken that differ from everything before them in most lines.
        docs: folder of the documentation's sources (``*.rst`` or ``*.rst.txt``).

    Raises:
        ValueError: there is no such text in one of the folders.
    """
    groups = [_files(folder, "Lib", ("*.py",)) for folder in libraries]
    groups.insert(1, _files(docs, "Doc", ("*.rst", "*.rst.txt")))
    held: dict[str, Document] = {}
    for name, text in (pair for group in groups for pair in group):
        if is_held_out(name):
            held.setdefault(name, Document(name, text, True))
    seen: set[int] = set()
    for document in held.values():
        seen.update(_lines(document.text))
    trained = [pair for group in groups for pair in group if not is_held_out(pair[0])]
    return [*held.values(), *_unseen(trained, seen)]


def _files(folder: Path, kind: str, patterns: Iterable[str]) -> list[tuple[str, str]]:
    paths = sorted({path for pattern in patterns for path in folder.rglob(pattern)})
    found = list(_texts(paths, folder, kind))
    if not found:
        raise ValueError(f"corpus: no text in {folder}; accepted: {', '.join(patterns)} files")
    return found


def _texts(paths: Sequence[Path], folder: Path, kind: str) -> Iterator[tuple[str, str]]:
    for path in paths:
        inner = path.relative_to(folder)
        skipped = any(part in _SKIPPED_DIRS or part.startswith("config-") for part in inner.parts)
        if skipped or _SKIPPED_NAMES.match(path.name):
            continue
        try:
            text = path.read_text(encoding="utf-8").replace("\r\n", "\n")
        except UnicodeDecodeError:
            continue  # a sample of another encoding
        if len(text) >= 64 and not _is_table(text):
            yield f"{kind}/{inner.as_posix().removesuffix('.txt')}", text


def _is_table(text: str) -> bool:
    digits = sum(map(text.count, "0123456789"))
    return bool(_CODE_PAGE.search(text)) or digits > _MOST_DIGITS * len(text)


def _lines(text: str) -> list[int]:
    stripped = (line.strip() for line in text.splitlines())
    return [hash(line) for line in stripped if len(line) >= _SHORT_LINE]


def _unseen(pairs: Iterable[tuple[str, str]], seen: set[int]) -> Iterator[Document]:
    for name, text in pairs:
        lines = _lines(text)
        n_seen = sum(line in seen for line in lines)
        if n_seen <= _MOST_SEEN_LINES * len(lines):
            seen.update(lines)
            yield Document(name, text, False)
