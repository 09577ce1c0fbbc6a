"""How text is cut before byte-pair encoding: one table row per ``tokenizer.ggml.pre`` name.

A model was trained on the pieces of one particular set of regular expressions; another set gives
other ids for the same text without any error. So only names listed here can encode.

Adding one: a row in :data:`PRE_TOKENIZERS`, with the expressions that the model's publisher uses
(Oniguruma syntax: ``&&`` intersects character classes), and vectors in the tests.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class PreTokenizer:
    """One way of cutting text.

    Attributes:
        regexes: applied in order; each cuts every piece so far into its matches and the rest.
        ignore_merges: a piece that is itself a token becomes that token without merging.
        add_bos: whether prompts begin with BOS where the file does not say
            (``tokenizer.ggml.add_bos_token`` is missing).
    """

    regexes: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False


# The letters of deepseek-llm are spelled out: cased letters only, so that Arabic, Hindi and the
# like fall through to the byte-pair encoder uncut. It ends with four ranges beyond the BMP.
_CASED_LETTERS = (
    "A-Za-z\xb5\xc0-\xd6\xd8-\xf6\xf8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af"
    "\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1"
    "\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5"
    "\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a"
    "\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d"
    "\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3"
    "\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115"
    "\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149"
    "\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d"
    "\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06"
    "\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
    "\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df"
    "\U0001e900-\U0001e943"
)

_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"

# Shared by the families that follow the o200k encoding: words split where lower case turns upper.
_UPPER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}"
_LOWER = r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_CLITICS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_BLANKS = r"\s*[\r\n]+|\s+(?!\S)|\s+"


def _camel_words(exclude: str, suffix: str) -> str:
    """The two alternatives for words; ``exclude`` is an intersection put into each class."""
    lead = r"[^\r\n\p{L}\p{N}]?"
    upper, lower = f"[{_UPPER}{exclude}]", f"[{_LOWER}{exclude}]"
    return f"{lead}{upper}*{lower}+{suffix}|{lead}{upper}+{lower}*{suffix}"


_DEEPSEEK_V3 = PreTokenizer(
    (
        r"\p{N}{1,3}",
        "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
        r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
        r"| ?[\p{P}\p{S}]+[\r\n]*|" + _BLANKS,
    ),
    add_bos=True,
)

_GPT2 = PreTokenizer(
    (r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",),
)

_GPT4O = PreTokenizer(
    (_camel_words("", _CLITICS + "?") + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _BLANKS,),
)

PRE_TOKENIZERS: Mapping[str, PreTokenizer] = MappingProxyType(
    {
        "deepseek-llm": PreTokenizer(
            (
                "[\r\n]",
                f"\\s?[{_CASED_LETTERS}]+",
                "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
                r"\s+$",
                _CJK,
                r"\p{N}+",
            ),
            add_bos=True,
        ),
        "deepseek-coder": PreTokenizer(
            ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, r"\p{N}"),
            add_bos=True,
        ),
        "deepseek-v3": _DEEPSEEK_V3,
        "joyai-llm": _DEEPSEEK_V3,
        "kimi-k2": PreTokenizer(
            (
                r"[\p{Han}]+|"
                + _camel_words(r"&&[^\p{Han}]", _CLITICS + "?")
                + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
                + _BLANKS,
            ),
        ),
        "tekken": PreTokenizer(
            (_camel_words("", "") + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _BLANKS,),
            ignore_merges=True,
            add_bos=True,
        ),
        "gpt-4o": _GPT4O,
        "kanana2": _GPT4O,
        "glm4": PreTokenizer(
            (
                _CLITICS
                + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
                + _BLANKS,
            ),
        ),
        "youtu": PreTokenizer(
            (
                "[\uac00-\ud7a3\u3131-\u318e]+"
                "|[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b\uff0c\u3001-\u303f\ufe30-\ufe4f]+"
                "|[\u3105-\u312f]+|[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
                _camel_words("", _CLITICS + "?") + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _BLANKS,
            ),
            ignore_merges=True,
        ),
        "gpt-2": _GPT2,
        "gigachat": _GPT2,
    }
)
