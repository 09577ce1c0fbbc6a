"""Text to token ids and back, from the metadata of a GGUF file.

Encoding is byte-level BPE by the ``tokenizers`` package; decoding is a table of bytes per token, so
that it works for files whose pre-tokenizer is unknown here, and for streams that end inside a
UTF-8 sequence. The encoder is built at its first use: a 129k vocabulary takes a third of a second,
and callers who only pass token ids never wait for it.
"""

from __future__ import annotations

import codecs
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from .errors import TokenizerError
from .pretokenizers import PRE_TOKENIZERS, PreTokenizer
from .vocabulary import (
    BYTE_OF,
    PREFIX,
    TokenType,
    Vocabulary,
    as_text,
    read_flag,
    read_strings,
    read_text,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Encoder
    from tokenizers.models import BPE


class Tokenizer:
    """A byte-level BPE tokenizer as a GGUF file describes it.

    Attributes:
        vocabulary: the token table.
        vocab_size: number of ids, padding included; ids are ``0 .. vocab_size - 1``.
        bos_id, eos_id, pad_id: ids from the file, or None where it has none.
        eos_ids: every id after which generation ends.
        add_bos: whether :meth:`encode` prepends BOS unless told otherwise.
        model, pre: kind of tokenizer and name of the pre-tokenizer, as in the file.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        merges: Sequence[str],
        *,
        model: str = "gpt2",
        pre: str = "",
        add_bos: bool | None = None,
    ) -> None:
        """Keep the tables; nothing is built yet.

        Args:
            vocabulary: the token table.
            merges: pairs ``"left right"``, best first.
            model: ``gpt2``; others can neither encode nor decode.
            pre: name of a row of ``PRE_TOKENIZERS``.
            add_bos: None takes the default of the pre-tokenizer.
        """
        self.vocabulary = vocabulary
        self.vocab_size = vocabulary.size
        self.bos_id = vocabulary.roles.get("bos")
        self.eos_id = vocabulary.roles.get("eos")
        self.pad_id = vocabulary.roles.get("padding")
        self.eos_ids = vocabulary.end_ids
        self.model = model
        self.pre = pre
        row = PRE_TOKENIZERS.get(pre)
        self.add_bos = add_bos if add_bos is not None else row is not None and row.add_bos
        self._merges = merges
        self._lock = threading.Lock()
        self._encoders: dict[bool, Encoder] = {}  # by parse_special
        self._lost_bytes: frozenset[int] = frozenset()  # BPE would drop them silently

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, object]) -> Tokenizer:
        """Take the tokenizer's keys out of a GGUF file's metadata.

        Arrays may be lists or numpy arrays. A kind of tokenizer that is not implemented is no
        error yet: :meth:`encode` and :meth:`decode` raise, and token ids still work.

        Raises:
            TokenizerError: a key has the wrong type or does not fit the others.
        """
        return cls(
            Vocabulary.from_metadata(metadata),
            read_strings(metadata, "merges"),
            model=read_text(metadata, "model"),
            pre=read_text(metadata, "pre"),
            add_bos=read_flag(metadata, "add_bos_token"),
        )

    def encode(
        self, text: str, *, add_bos: bool | None = None, parse_special: bool = True
    ) -> list[int]:
        """Ids of a text.

        Args:
            text: any valid Unicode text; it is not normalized.
            add_bos: prepend BOS; None does what the file says (see ``add_bos``).
            parse_special: control tokens in the text become their ids; False encodes them as
                plain text, for input from strangers. User-defined tokens are always recognized.

        Raises:
            TokenizerError: the text has lone surrogates, BOS is wanted but the file has none, or
                the file's tokenizer is not known here.
        """
        data = _utf8(text)
        prefix: list[int] = []
        if self.add_bos if add_bos is None else add_bos:
            if self.bos_id is None:
                raise TokenizerError(
                    f"encode: BOS is wanted, but the file has no {PREFIX}bos_token_id; "
                    "pass add_bos=False"
                )
            prefix = [self.bos_id]
        encoder = self._encoder(parse_special)
        lost = self._lost_bytes and self._lost_bytes.intersection(data)
        if lost:
            raise TokenizerError(
                f"encode: the vocabulary has no token for byte 0x{min(lost):02x} of the text"
            )
        return prefix + encoder.encode(text, add_special_tokens=False).ids

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes that one id stands for; not always valid UTF-8, empty for unused ids.

        Raises:
            TokenizerError: the id is out of range, or the file's tokenizer is not known here.
        """
        self._check_model()
        return self.vocabulary.bytes_of(token_id)

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Text of ids; bytes that are no UTF-8 become U+FFFD.

        Args:
            ids: token ids.
            skip_special: leave out control tokens, except those that structure a text (roles,
                tool calls, fill-in-the-middle).

        Raises:
            TokenizerError: an id is out of range, or the file's tokenizer is not known here.
        """
        skipped = self.vocabulary.special_ids if skip_special else frozenset()
        data = b"".join(self.token_bytes(i) for i in ids if int(i) not in skipped)
        return data.decode("utf-8", "replace")

    def stream_decoder(self, *, skip_special: bool = False) -> StreamDecoder:
        """A decoder that takes ids one by one; its pieces join to what :meth:`decode` gives."""
        return StreamDecoder(self, skip_special=skip_special)

    def is_control(self, token_id: int) -> bool:
        """Whether an id is a control token, such as BOS or a role marker.

        Raises:
            TokenizerError: the id is out of range.
        """
        return int(self.vocabulary.types[self.vocabulary.checked_id(token_id)]) == TokenType.CONTROL

    @property
    def bos_token(self) -> str:
        """Text of BOS, empty where the file has none."""
        return "" if self.bos_id is None else self.vocabulary.text(self.bos_id)

    @property
    def eos_token(self) -> str:
        """Text of EOS, empty where the file has none."""
        return "" if self.eos_id is None else self.vocabulary.text(self.eos_id)

    @property
    def can_decode(self) -> bool:
        """Whether ids can be turned into text; token ids work in any case."""
        return self.model == "gpt2"

    @property
    def problem(self) -> str | None:
        """Why text cannot be encoded, or None where it can."""
        if not self.can_decode:
            shown = repr(self.model) if self.model else "missing"
            return (
                f"tokenizer: {PREFIX}model is {shown}; only 'gpt2' (byte-level BPE) is known. "
                "Calls with token ids still work"
            )
        if self.pre not in PRE_TOKENIZERS:
            shown = repr(self.pre) if self.pre else "missing"
            return (
                f"tokenizer: {PREFIX}pre is {shown}; known are {', '.join(PRE_TOKENIZERS)}. "
                "Decoding and calls with token ids still work"
            )
        return None

    def _check_model(self) -> None:
        if not self.can_decode:
            raise TokenizerError(self.problem)

    def _pre_tokenizer(self) -> PreTokenizer:
        row = PRE_TOKENIZERS.get(self.pre)
        if row is None:
            raise TokenizerError(self.problem)
        return row

    def _encoder(self, parse_special: bool) -> Encoder:
        with self._lock:
            if parse_special not in self._encoders:
                self._check_model()
                self._encoders[parse_special] = self._build_encoder(parse_special)
            return self._encoders[parse_special]

    def _build_encoder(self, parse_special: bool) -> Encoder:
        from tokenizers import AddedToken, Regex, pre_tokenizers
        from tokenizers import Tokenizer as Encoder

        row = self._pre_tokenizer()
        other = self._encoders.get(not parse_special)  # it has the same BPE tables
        encoder = Encoder(other.model if other else self._build_bpe(row))
        encoder.pre_tokenizer = pre_tokenizers.Sequence(
            [
                *(pre_tokenizers.Split(Regex(r), "isolated") for r in row.regexes),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        kinds = [TokenType.USER_DEFINED, *([TokenType.CONTROL] if parse_special else [])]
        added = [self.vocabulary.text(i) for kind in kinds for i in self.vocabulary.ids_of(kind)]
        encoder.add_tokens([AddedToken(text, normalized=False) for text in added])
        self._lost_bytes = frozenset(
            b for c, b in BYTE_OF.items() if encoder.token_to_id(c) is None
        )
        return encoder

    def _build_bpe(self, row: PreTokenizer) -> BPE:
        from tokenizers.models import BPE

        pairs = [_split_merge(as_text(merge)) for merge in self._merges]
        try:
            return BPE(self.vocabulary.to_ids(), pairs, ignore_merges=row.ignore_merges)
        except Exception as error:  # the package raises nothing narrower
            raise TokenizerError(f"tokenizer: {PREFIX}merges: {error}") from error


class StreamDecoder:
    """Turns ids into text as they come, holding back what is not yet valid UTF-8."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = False) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.vocabulary.special_ids if skip_special else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """Text that is complete after this id, often one word, sometimes none.

        Raises:
            TokenizerError: the id is out of range, or the file's tokenizer is not known here.
        """
        if int(token_id) in self._skipped:
            return ""
        return self._utf8.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        """What was held back, as U+FFFD; the decoder is then as new."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest


def _split_merge(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    if not (left and right):
        raise TokenizerError(f"tokenizer: {PREFIX}merges has {merge!r}; expected 'left right'")
    return left, right


def _utf8(text: str) -> bytes:
    if not isinstance(text, str):
        raise TokenizerError(f"encode: got {type(text).__name__}; expected str")
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"encode: U+{ord(text[error.start]):04X} at position {error.start} is a lone "
            "surrogate; the text was not valid UTF-8"
        ) from None
