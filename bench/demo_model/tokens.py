"""The tokenizer, and the token files that training reads.

``tokens.npz`` has ``train`` and ``held`` (uint16 [n]: documents as BOS, tokens, EOS) and
``held_starts`` (int64 [files + 1]); ``meta.json`` has what the arrays cannot tell.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from demo_model.corpus import Document

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
BOS_ID, EOS_ID = 0, 1


@dataclass(frozen=True)
class Meta:
    """What the token files hold.

    Attributes:
        vocab_size: ids 0 .. vocab_size - 1.
        newline_ids: tokens whose text ends with a line break.
        train_files: documents trained on.
        train_bytes: their bytes in UTF-8.
        held_names: held-out documents, in the order of the tokens.
        held_bytes: bytes of each.
    """

    vocab_size: int
    newline_ids: list[int]
    train_files: int
    train_bytes: int
    held_names: list[str]
    held_bytes: list[int]


@dataclass(frozen=True)
class TokenFiles:
    """The token files in memory: uint16 streams and their description."""

    train: NDArray[np.uint16]
    held: list[NDArray[np.uint16]]
    meta: Meta


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> Any:
    """A byte-level BPE ``tokenizers.Tokenizer`` under the deepseek-v3 expressions."""
    from mla_backend.pretokenizers import PRE_TOKENIZERS
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    splits = [
        pre_tokenizers.Split(Regex(regex), "isolated")
        for regex in PRE_TOKENIZERS["deepseek-v3"].regexes
    ]
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def prepare(documents: Sequence[Document], vocab_size: int, folder: Path) -> Meta:
    """Train the tokenizer on the training text, encode all, write everything to the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    trained = [doc for doc in documents if not doc.held_out]
    held = [doc for doc in documents if doc.held_out]
    tokenizer = train_tokenizer([doc.text for doc in trained], vocab_size)
    tokenizer.save(str(folder / "tokenizer.json"))
    train_ids, held_ids = (_encode(tokenizer, group) for group in (trained, held))
    starts = np.cumsum([0, *map(len, held_ids)])
    np.savez_compressed(
        folder / "tokens.npz",
        train=np.concatenate(train_ids),
        held=np.concatenate(held_ids),
        held_starts=starts,
    )
    size = tokenizer.get_vocab_size()
    meta = Meta(
        vocab_size=size,
        newline_ids=[i for i in range(3, size) if tokenizer.decode([i]).endswith("\n")],
        train_files=len(trained),
        train_bytes=sum(len(doc.text.encode()) for doc in trained),
        held_names=[doc.name for doc in held],
        held_bytes=[len(doc.text.encode()) for doc in held],
    )
    (folder / "meta.json").write_text(json.dumps(asdict(meta), indent=1))
    return meta


def _encode(tokenizer: Any, documents: Sequence[Document]) -> list[NDArray[np.uint16]]:
    encoded = tokenizer.encode_batch([doc.text for doc in documents])
    return [np.array([BOS_ID, *e.ids, EOS_ID], np.uint16) for e in encoded]


def load(folder: Path) -> TokenFiles:
    """Read what :func:`prepare` wrote."""
    meta = Meta(**json.loads((folder / "meta.json").read_text()))
    with np.load(folder / "tokens.npz") as arrays:
        starts = arrays["held_starts"]
        held = np.split(arrays["held"], starts[1:-1])
        return TokenFiles(arrays["train"], held, meta)
