"""Recognising how a checkpoint cuts text, by its regular expressions or by what they do.

GGUF files hold a name instead of the expressions. Names follow from comparing a checkpoint's
expressions with those of the table; the same cut written differently is found by cutting a text
full of hard cases both ways.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from ..pretokenizers import PRE_TOKENIZERS, PreTokenizer

if TYPE_CHECKING:
    from tokenizers.pre_tokenizers import PreTokenizer as Splitter

#: What ByteLevel splits by where it is told to use its own expression.
_BYTE_LEVEL: Final = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DIGIT: Final = r"\p{N}"
_ESCAPES: Final = {"\r": r"\r", "\n": r"\n", "\t": r"\t"}

#: Numbers, blanks, cases, clitics, punctuation and scripts, in neighbourhoods that tell cuts apart.
PROBE: Final = (
    "3 33 333 3333 33333 333333 3.14 1,000,000 ٣٤٥ Ⅷ x2y 2x"
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n"
    "Hello world HelloWorld helloWORLD camelCaseWord snake_case_word I'm you'LL WE'VE he's 'tis "
    'don\'t!? ...!!! --- ===[{(<>)}]``` "quoted" #include <stdio.h> // a+b==c; f(x)[0]->y '
    "https://example.org/a_b?c=d&e=%20 a/b\\c end.\r\n\r\n  indented\n\tTab\n"
    "中文字符 汉字123漢字 日本語テキスト ひらがな カタカナ 한국어 문장 "
    "Ελληνικά русский ЯЗЫК العربية हिन्दी ไทย ქართული ԱՐՄ "
    "e\u0301te\u0301 naïve Straße ǅ ß ʰ ﬁ Ａｂｃ。、！？“”‘’… 🚀🚀 👩\u200d👧 ₿ € ½ ± ∑\u00a0x"
    "\u3000y \u200b z   trailing   "
)


def recognise(tokenizer: Mapping[str, Any], problems: list[str]) -> str | None:
    """The name of a ``tokenizer.json``'s pre-tokenizer, or None with the reason in ``problems``."""
    _check_normalizer(tokenizer.get("normalizer"), problems)
    stated = tokenizer.get("pre_tokenizer")
    ignore_merges = bool((tokenizer.get("model") or {}).get("ignore_merges"))
    candidates = {
        name: row for name, row in PRE_TOKENIZERS.items() if row.ignore_merges == ignore_merges
    }
    regexes = _regexes(stated)
    if regexes is not None:
        for name, row in candidates.items():
            if _normalised(row.regexes) == regexes:
                return name
    found = _recognise_by_cuts(stated, candidates)
    if found is None:
        shown = "none" if regexes is None else " then ".join(map(repr, regexes))
        problems.append(
            f"tokenizer.json: pre_tokenizer: found one that is not known ({shown[:400]}); "
            f"accepted: {', '.join(PRE_TOKENIZERS)} (--pre names one of them if you know better)"
        )
    return found


def _check_normalizer(value: Any, problems: list[str]) -> None:
    """GGUF files cannot say that text is normalized first."""
    if value is None or (isinstance(value, Mapping) and value.get("normalizers") == []):
        return
    kind = value.get("type") if isinstance(value, Mapping) else value
    problems.append(f"tokenizer.json: normalizer: found {kind!r}; accepted: none")


def _regexes(stated: Any) -> tuple[str, ...] | None:
    """The expressions of a pre-tokenizer in order, normalised; None where it has other steps."""
    if not isinstance(stated, Mapping):
        return None
    steps = stated.get("pretokenizers") if stated.get("type") == "Sequence" else [stated]
    if not isinstance(steps, list) or not all(isinstance(step, Mapping) for step in steps):
        return None
    found: list[str] = []
    for step in steps:
        kind, pattern = step.get("type"), step.get("pattern")
        if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
            regex = pattern.get("Regex") if isinstance(pattern, Mapping) else None
            if not isinstance(regex, str):
                return None
            found.append(regex)
        elif kind == "Digits":
            found.append(_DIGIT)
        elif kind == "ByteLevel" and not step.get("add_prefix_space"):
            found += [_BYTE_LEVEL] if step.get("use_regex", True) else []
        else:
            return None
    return _normalised(tuple(found))


def _normalised(regexes: tuple[str, ...]) -> tuple[str, ...]:
    """Expressions written one way: control characters escaped, digits alone or in runs alike.

    Cutting digits singly or in runs makes no difference to a vocabulary that was trained on single
    ones, and tables for both exist in the wild.
    """
    texts = []
    for regex in regexes:
        for character, escape in _ESCAPES.items():
            regex = regex.replace(character, escape)
        texts.append(_DIGIT if regex == _DIGIT + "+" else regex)
    return tuple(texts)


def _recognise_by_cuts(stated: Any, candidates: Mapping[str, PreTokenizer]) -> str | None:
    """The first candidate that cuts ``PROBE`` as the checkpoint does."""
    theirs = _cut(_splitter_from_json(stated))
    if theirs is None:
        return None
    for name, row in candidates.items():
        if _cut(_splitter_of(row)) == theirs:
            return name
    return None


def _splitter_from_json(stated: Any) -> Splitter | None:
    from tokenizers import Tokenizer

    empty = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": stated,
        "model": {"type": "BPE", "vocab": {}, "merges": []},
    }
    try:
        splitter: Splitter | None = Tokenizer.from_str(json.dumps(empty)).pre_tokenizer
    except Exception:  # the package raises nothing narrower; what it cannot read is not known
        return None
    return splitter


def _splitter_of(row: PreTokenizer) -> Splitter:
    from tokenizers import Regex, pre_tokenizers

    return pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(regex), "isolated") for regex in row.regexes),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _cut(splitter: Splitter | None) -> list[str] | None:
    if splitter is None:
        return None
    return [piece for piece, _ in splitter.pre_tokenize_str(PROBE)]
