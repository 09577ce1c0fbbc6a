"""The head of a model card: licence, languages, tags, and the models that it came from.

A card is a README.md that begins with YAML between two lines of dashes. Of YAML only what cards
use is read: keys with a text, with a list in brackets, or with items on lines of their own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from ..gguf import Value
from .naming import parse_name

_FENCE: Final = "---"
_HUB: Final = "https://huggingface.co/"
_TEXTS: Final = {
    "license": "general.license",
    "license_name": "general.license.name",
    "license_link": "general.license.link",
}
_LISTS: Final = {
    "general.tags": ("tags", "pipeline_tag"),
    "general.languages": ("languages", "language"),
}
_ANCESTORS: Final = {
    "base_model": ("base_model", "base_models"),
    "dataset": ("datasets", "dataset"),
}


def card_keys(path: Path, n_params: int) -> dict[str, Value]:
    """Metadata keys from a checkpoint's README.md; none where it has no head."""
    try:
        card = _parse((path / "README.md").read_text("utf-8", errors="replace"))
    except OSError:
        return {}
    keys: dict[str, Value] = {}
    for name, key in _TEXTS.items():
        if card.get(name):
            keys[key] = ",".join(card[name])
    for kind, names in _ANCESTORS.items():
        found = next((card[name] for name in names if card.get(name)), [])
        if found:
            keys |= _ancestors(f"general.{kind}", found, n_params)
    for key, names in _LISTS.items():
        values = tuple(value for name in names for value in card.get(name, []))
        if values:
            keys[key] = values
    return keys


def _ancestors(prefix: str, ids: list[str], n_params: int) -> dict[str, Value]:
    keys: dict[str, Value] = {f"{prefix}.count": len(ids)}
    for i, name in enumerate(ids):
        if name.startswith(("http://", "https://")) and not name.startswith(_HUB):
            keys[f"{prefix}.{i}.repo_url"] = name
            continue
        name = name.removeprefix(_HUB)
        parsed = parse_name(name, n_params)
        entries = {
            "name": parsed.title,
            "version": parsed.version,
            "organization": parsed.organization,
            "repo_url": _HUB + name if parsed.organization else None,
        }
        keys |= {f"{prefix}.{i}.{key}": text for key, text in entries.items() if text}
    return keys


def _parse(text: str) -> dict[str, list[str]]:
    """Top-level keys and their values; a single one is a list of one."""
    lines = text.splitlines()
    if not lines or lines[0] != _FENCE or _FENCE not in lines[1:]:
        return {}
    found: dict[str, list[str]] = {}
    current: list[str] | None = None
    for line in lines[1 : lines.index(_FENCE, 1)]:
        stripped = line.strip()
        if not stripped or stripped.startswith("#"):
            continue
        if stripped.startswith("- "):
            if current is not None and ": " not in stripped:
                current.append(_unquoted(stripped[2:]))
        elif not line[0].isspace() and ":" in line:
            key, _, value = line.partition(":")
            current = found.setdefault(key.strip(), [])
            current += _values(value.strip())
        else:
            current = None  # nested objects are left out
    return found


def _values(text: str) -> list[str]:
    if text.startswith("[") and text.endswith("]"):
        return [_unquoted(item) for item in text[1:-1].split(",") if item.strip()]
    return [_unquoted(text)] if text and text[0] not in "|>{&*" else []


def _unquoted(text: str) -> str:
    text = text.strip()
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text
