"""What the name of a model tells: the family, its version, its size, what it was tuned for.

A name such as ``Family-V2-7B-Chat`` is a row of parts. Numbers are versions, numbers with a unit
are sizes, well-known words are tunings; the words before the first of these are the family.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_VERSION: Final = re.compile(r"(v|iter)?\d+(\.\d+)*", re.IGNORECASE)
_SIZE: Final = re.compile(
    r"((a|\d+x)?\d+([._]\d+)?[kmbt]\d?|small|mini|medium|large|x?xl)", re.IGNORECASE
)
_FORMAT: Final = re.compile(r"i?q\d(_\w)*|b?fp?(16|32)", re.IGNORECASE)
_TUNING: Final = re.compile(r"chat|instruct|vision|lora", re.IGNORECASE)
# How the hub's cache stores a snapshot: models--owner--name/snapshots/<commit>.
_CACHED: Final = re.compile(r"models--(.+?)--(.+)")
_UNITS: Final = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


@dataclass(frozen=True)
class ModelName:
    """A name taken apart; None for what it does not tell."""

    title: str
    organization: str | None = None
    basename: str | None = None
    finetune: str | None = None
    version: str | None = None
    size_label: str | None = None


def parse_name(name: str, n_params: int) -> ModelName:
    """Take apart ``name`` or ``owner/name``; sizes far from ``n_params`` are no sizes."""
    owner, _, own = name.rpartition("/")
    if " " in own:
        return ModelName(title=own)
    parts = [_Part.of(text, i, n_params) for i, text in enumerate(filter(None, own.split("-")))]
    _mark_family(parts)

    def join(kind: str) -> str | None:
        return "-".join(dict.fromkeys(part.text for part in parts if part.kind == kind)) or None

    finetune, version, size = join("finetune"), join("version"), join("size")
    known = finetune or version or size
    return ModelName(
        title=title_of(own),
        organization=title_of(owner) if owner and not owner.startswith(".") else None,
        basename=join("family") if known else None,
        finetune=finetune,
        version=version,
        size_label=size,
    )


def name_of_directory(path: Path) -> str:
    """The name of a checkpoint's directory, ``owner/name`` where a hub's cache tells both."""
    path = path.absolute()
    if path.parent.name == "snapshots":
        match = _CACHED.fullmatch(path.parent.parent.name)
        if match is not None:
            return f"{match[1]}/{match[2]}"
    return path.name


def title_of(name: str) -> str:
    """``tiny-random-v2`` -> ``Tiny Random v2``: words in capitals, versions and acronyms as is."""
    words = name.replace("-", " ").split()
    return " ".join(
        word.title() if word.islower() and not re.fullmatch(r"v\d+(\.\d+)*|\d.*", word) else word
        for word in words
    )


def size_label(shapes: dict[str, tuple[int, ...]]) -> str:
    """``16x2.3M``: experts, and parameters of everything beside them and of one of each.

    Args:
        shapes: of all tensors by GGUF name, stacked experts outermost.
    """
    shared = expert = n_expert_sum = n_stacked = 0
    for name, shape in shapes.items():
        size = 1
        for extent in shape:
            size *= extent
        if "_exps." in name and len(shape) >= 3:
            expert += size // shape[0]
            n_expert_sum += shape[0]
            n_stacked += 1
        else:
            shared += size
    rounded = _rounded(shared + expert)
    return f"{n_expert_sum // n_stacked}x{rounded}" if n_stacked else rounded


def _rounded(count: int) -> str:
    """A count with a unit and at least two digits."""
    unit, scale = next(
        ((unit, scale) for unit, scale in reversed(_UNITS.items()) if count > scale), ("K", 1e3)
    )
    scaled = count / scale
    n_digits = len(str(round(scaled)).lstrip("0"))
    return f"{scaled:.{max(2 - n_digits, 0)}f}{unit}"


@dataclass
class _Part:
    """A part of a name and what it is: "" while that is open."""

    text: str
    kind: str

    @classmethod
    def of(cls, text: str, index: int, n_params: int) -> _Part:
        if _VERSION.fullmatch(text):
            return cls(text, "version")
        if _FORMAT.fullmatch(text):
            return cls(text.upper(), "format")
        if index and _SIZE.fullmatch(text):
            return cls._of_size(text.replace("_", "."), n_params)
        if index and _TUNING.fullmatch(text):
            return cls(text, "finetune")
        return cls(text, "")

    @classmethod
    def _of_size(cls, text: str, n_params: int) -> _Part:
        if text[-1].isdecimal():  # 7b1 means 7.1b
            text = f"{text[:-2]}.{text[-1]}{text[-2]}"
        if len(text) > 1 and text[-2].isdecimal():
            text = text[:-1] + text[-1].upper()
        number, unit = text[:-1], text[-1]
        if re.fullmatch(r"\d+(\.\d+)?", number) and unit in _UNITS:
            stated = float(number) * _UNITS[unit]
            if abs(stated - n_params) > 7 * n_params // 8:  # rather a context length
                return cls(number + unit.lower(), "finetune")
        return cls(text, "size")


def _mark_family(parts: list[_Part]) -> None:
    """The leading words, versions among them; what follows and is still open is a tuning."""
    sized = any(part.kind == "size" and any(map(str.isdecimal, part.text)) for part in parts)
    for part in parts:
        if part.kind == "size" and sized and part.text.isalpha():
            part.kind = ""  # "large" beside a number is just a word
    count = 0
    while count < len(parts) and (
        parts[count].kind == "version" or (not parts[count].kind and parts[count].text[0].isalpha())
    ):
        count += 1
    last = count
    while count == len(parts) and last and parts[last - 1].kind == "version":
        last -= 1  # a version at the very end is not part of the family
    for i, part in enumerate(parts):
        if i < last:
            part.kind = "family"
        elif not part.kind:
            part.kind = "finetune"
