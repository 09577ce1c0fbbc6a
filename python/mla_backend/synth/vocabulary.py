"""A byte-level BPE vocabulary of any size, built from a list of words instead of being trained."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice, product

from ..errors import UsageError

_NORMAL, _SPECIAL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
_BOS, _EOS, _PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
_ROLES = ("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>")
#: Stands for the space byte in byte-level tokens.
_SPACE = "\u0120"
#: One id in this many is padding without meaning, up to what published vocabularies have.
_IDS_PER_PADDING, _MAX_PADDING = 64, 2400

_WORDS = """\
the of and to in is that for it as with on be by this are or from at an not was have which can has
will one all more other when use time if there their we you your they he she his her its our my me
who what how why where then than so no yes do does did done may must should would could been being
also into over under after before between through while during each some any many much most few new
old first last next same different good great small large long short high low right left up down
out off back here now only just very well even still again never always often about above below
because until since against without within number part place work word line page book water day
night year people man woman child life world house school state country city hand eye head face
side way thing name point form case group set list table value type order change result reason
question answer problem example system program process model data code file test run read write
call return start stop open close make take give get put keep find show tell ask need want like
know think see look come go move turn help try learn play power light sound color paper letter
story music river mountain tree flower animal bird fish horse sun moon star wind rain snow fire
earth stone metal glass wood bread salt sugar milk coffee green blue white black red brown
simple clear early late near far open free true false real common public natural human social
language science history nature theory method energy matter space field force measure memory
attention latent tensor vector matrix layer token expert cache weight context position
"""

_V2_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}User: {{ m['content'] }}\n\n"
    "{% elif m['role'] == 'assistant' %}Assistant: {{ m['content'] }}{{ eos_token }}"
    "{% else %}{{ m['content'] }}\n\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
_V3_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}<｜User｜>{{ m['content'] }}"
    "{% elif m['role'] == 'assistant' %}<｜Assistant｜>{{ m['content'] }}{{ eos_token }}"
    "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜>{% endif %}"
)


@dataclass(frozen=True)
class Vocabulary:
    """Tokens with their GGUF type numbers, merges by rank, and the ids that have a role."""

    pre: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    merges: tuple[str, ...]
    bos: int
    eos: int
    padding: int
    chat_template: str


def make_vocabulary(n_tokens: int, pre: str) -> Vocabulary:
    """A vocabulary of ``n_tokens`` ids.

    With ``pre`` ``deepseek-v3`` the special tokens come first and those of the roles after the
    merges; otherwise BOS and EOS come after the merges. Unused ids fill the end.

    Raises UsageError where there is no room for the bytes and the special tokens.
    """
    newer = pre == "deepseek-v3"
    first = (_BOS, _EOS, _PAD) if newer else ()
    last = _ROLES if newer else (_BOS, _EOS)
    n_unused = min(n_tokens // _IDS_PER_PADDING, _MAX_PADDING)
    alphabet = _byte_alphabet()
    n_merges = n_tokens - n_unused - len(first) - len(last) - len(alphabet)
    if n_merges < 0:
        raise UsageError(f"a vocabulary of {n_tokens} tokens has no room for all bytes")
    merges = _make_merges(alphabet, n_merges)
    tokens = [*first, *alphabet, *(left + right for left, right in merges), *last]
    types = [_SPECIAL] * len(first) + [_NORMAL] * (len(alphabet) + n_merges)
    types += [_USER_DEFINED if newer else _SPECIAL] * len(last) + [_UNUSED] * n_unused
    tokens += [f"[PAD{i}]" for i in range(len(tokens), n_tokens)]
    return Vocabulary(
        pre=pre,
        tokens=tuple(tokens),
        types=tuple(types),
        merges=tuple(f"{left} {right}" for left, right in merges),
        bos=tokens.index(_BOS),
        eos=tokens.index(_EOS),
        padding=tokens.index(_PAD if newer else _EOS),
        chat_template=_V3_TEMPLATE if newer else _V2_TEMPLATE,
    )


def _byte_alphabet() -> list[str]:
    """The 256 characters that stand for bytes: visible ones as they are, others from U+0100."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(c) for c in visible] + [chr(0x100 + i) for i in range(256 - len(visible))]


def _make_merges(alphabet: list[str], n_merges: int) -> list[tuple[str, str]]:
    """Merges that build the words letter by letter, then pairs of what there is so far."""
    known = set(alphabet)
    merges: list[tuple[str, str]] = []

    def merge(left: str, right: str) -> None:
        if len(merges) < n_merges and left + right not in known:
            known.add(left + right)
            merges.append((left, right))

    for word in _WORDS.split():
        for end in range(1, len(word)):
            merge(word[:end], word[end])
        merge(_SPACE, word)
    stems = [left + right for left, right in merges if not left.startswith(_SPACE)]
    for left, right in islice(product(stems, stems), n_merges):
        merge(left, right)
        merge(_SPACE + left if _SPACE + left in known else left, right)
    if len(merges) < n_merges:
        raise UsageError(f"{n_merges} merges are too many for the words at hand")
    return merges
