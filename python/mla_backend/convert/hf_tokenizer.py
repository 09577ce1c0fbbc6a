"""The tokenizer of a checkpoint as metadata keys: vocabulary, special ids, chat templates."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from ..gguf import Value
from ..pretokenizers import PRE_TOKENIZERS
from .checkpoint import read_json
from .pre_tokenizer import recognise
from .vocab import Vocab, added_tokens, vocab_from_json, vocab_from_tiktoken

#: Special tokens as checkpoints call them -> as files do (one is misspelt there for good).
_SPECIAL: Final = {
    "bos": "bos",
    "eos": "eos",
    "unk": "unknown",
    "sep": "seperator",
    "pad": "padding",
    "cls": "cls",
    "mask": "mask",
}
#: Architectures whose settings do not say which tokens begin a text and end a turn.
_SPECIAL_TEXTS: Final[Mapping[str, Mapping[str, str]]] = {
    "Glm4MoeLiteForCausalLM": {
        "bos": "[gMASK]",
        "eot": "<|user|>",
        "eom": "<|observation|>",
        "unknown": "<|endoftext|>",
    }
}
_ADDABLE: Final = ("bos", "eos", "sep")
_PREFIX: Final = "tokenizer.ggml."
_TIKTOKEN: Final = "tiktoken.model"
#: The only published tiktoken vocabulary of the architecture.
_TIKTOKEN_PRE: Final = "kimi-k2"


def read_tokenizer(
    path: Path, config: Mapping[str, Any], n_vocab: int, pre: str | None, problems: list[str]
) -> dict[str, Value]:
    """All tokenizer keys in file order.

    Args:
        path: the checkpoint's directory.
        config: ``config.json``, which may name special ids.
        n_vocab: ids in all; those without a token become padding.
        pre: name of the pre-tokenizer, None to recognise it.
        problems: everything wrong is added here.
    """
    settings = read_json(path / "tokenizer_config.json", problems, required=False) or {}
    tokenizer = _read_tokenizer_json(path, problems)
    if pre is not None and pre not in PRE_TOKENIZERS:
        problems.append(f"--pre: found {pre!r}; accepted: {', '.join(PRE_TOKENIZERS)}")
    if tokenizer is not None:
        name = pre or recognise(tokenizer, problems) or ""
        vocab = vocab_from_json(tokenizer, settings, n_vocab, problems)
    elif (path / _TIKTOKEN).exists():
        name = pre or _TIKTOKEN_PRE
        vocab = vocab_from_tiktoken(path / _TIKTOKEN, settings, n_vocab, problems)
    else:
        return {}
    keys = _vocabulary_keys(vocab, name)
    keys |= _special_ids(tokenizer or {}, settings, config, n_vocab, problems)
    keys |= _add_flags(tokenizer or {}, settings)
    keys |= _chat_templates(path, settings, problems)
    return keys


def _read_tokenizer_json(path: Path, problems: list[str]) -> dict[str, Any] | None:
    file = path / "tokenizer.json"
    if not file.exists() and not (path / _TIKTOKEN).exists():
        other = "tokenizer.model" if (path / "tokenizer.model").exists() else None
        hint = f" ({other} alone is not read: only byte-level BPE is)" if other else ""
        problems.append(f"neither tokenizer.json nor {_TIKTOKEN}{hint}")
        return None
    return read_json(file, problems, required=False)


def _vocabulary_keys(vocab: Vocab, pre: str) -> dict[str, Value]:
    return {
        f"{_PREFIX}model": "gpt2",
        f"{_PREFIX}pre": pre,
        f"{_PREFIX}tokens": vocab.tokens,
        f"{_PREFIX}token_type": np.array(vocab.types, np.int32),
        f"{_PREFIX}merges": vocab.merges,
    }


def _special_ids(
    tokenizer: Mapping[str, Any],
    settings: Mapping[str, Any],
    config: Mapping[str, Any],
    n_vocab: int,
    problems: list[str],
) -> dict[str, Value]:
    """Ids by the texts in ``tokenizer_config.json``, else as ``config.json`` numbers them."""
    ids = {token.text: index for index, token in added_tokens(tokenizer, settings, []).items()}
    keys: dict[str, Value] = {}
    nested: Any = config.get("text_config")
    for kind, name in _SPECIAL.items():
        index: Any = ids.get(_content(settings.get(f"{kind}_token")) or "")
        if index is None:
            index = config.get(f"{kind}_token_id")
        if index is None and isinstance(nested, Mapping):
            index = nested.get(f"{kind}_token_id")
        if isinstance(index, list) and index:
            index = index[0]  # the others end answers too, which readers know by their texts
        if type(index) is not int:
            continue
        if not 0 <= index < n_vocab:
            problems.append(f"{kind}_token_id: found {index}; accepted: 0 to {n_vocab - 1}")
            continue
        keys[f"{_PREFIX}{name}_token_id"] = index
    for architecture in config.get("architectures") or []:
        for name, text in _SPECIAL_TEXTS.get(architecture, {}).items():
            if text in ids:
                keys[f"{_PREFIX}{name}_token_id"] = ids[text]
    return keys


def _content(entry: Any) -> str | None:
    """The text of a token that is given as a string or as an object."""
    if isinstance(entry, Mapping):
        entry = entry.get("content")
    return entry if isinstance(entry, str) else None


def _add_flags(tokenizer: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Value]:
    """Whether prompts begin and end with special tokens, where the checkpoint says."""
    flags = _template_flags(tokenizer.get("post_processor"), settings)
    for kind in _ADDABLE:
        stated = settings.get(f"add_{kind}_token")
        if isinstance(stated, bool):
            flags[kind] = stated
    return {f"{_PREFIX}add_{kind}_token": flags[kind] for kind in _ADDABLE if kind in flags}


def _template_flags(processor: Any, settings: Mapping[str, Any]) -> dict[str, bool]:
    """What a post-processor of type TemplateProcessing puts around a text."""
    flags: dict[str, bool] = {}
    if not isinstance(processor, Mapping):
        return flags
    for step in processor.get("processors") or [processor]:
        single = step.get("single") if isinstance(step, Mapping) else None
        if step.get("type") != "TemplateProcessing" or not single or len(single) < 2:
            continue
        for kind, place in (("bos", single[0]), ("eos", single[-1])):
            special = place.get("SpecialToken") if isinstance(place, Mapping) else None
            if special:
                flags[kind] = special.get("id") == _content(settings.get(f"{kind}_token"))
    return flags


def _chat_templates(
    path: Path, settings: Mapping[str, Any], problems: list[str]
) -> dict[str, Value]:
    """One template, or several by name, from the settings or from files of their own."""
    value = settings.get("chat_template")
    if value is None:
        value = _template_files(path, problems)
    if isinstance(value, str):
        return {"tokenizer.chat_template": value}
    if value is None:
        return {}
    named: dict[str, str] = {}
    for entry in value if isinstance(value, list) else []:
        text = entry.get("template") if isinstance(entry, Mapping) else None
        name = re.sub("[^A-Za-z0-9]", "_", str(entry.get("name", ""))) if text else ""
        if name and isinstance(text, str):
            named[name] = text
    if not named:
        problems.append("tokenizer_config.json: chat_template: accepted: a string or named ones")
    default = named.pop("default", None)
    keys: dict[str, Value] = {
        f"tokenizer.chat_template.{name}": text for name, text in named.items()
    }
    if named:
        keys["tokenizer.chat_templates"] = tuple(sorted(named))
    if default is not None:
        keys["tokenizer.chat_template"] = default
    return keys


def _template_files(path: Path, problems: list[str]) -> Any:
    main = path / "chat_template.jinja"
    try:
        if main.exists():
            others = sorted((path / "additional_chat_templates").glob("*.jinja"))
            named = [(main, "default"), *((other, other.stem) for other in others)]
            texts = [{"name": name, "template": file.read_text("utf-8")} for file, name in named]
            return texts if others else texts[0]["template"]
    except (OSError, UnicodeDecodeError) as error:
        problems.append(f"{main.name}: cannot be read: {error}")
        return None
    stored = read_json(path / "chat_template.json", problems, required=False) or {}
    return stored.get("chat_template")
