"""Vocabulary, special ids, templates, and recognising pre-tokenizers."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from convert.checkpoints import VOCAB, byte_characters, checkpoint, pre_tokenizer, tokenizer_json
from mla_backend.convert.hf_tokenizer import read_tokenizer
from mla_backend.convert.pre_tokenizer import recognise
from mla_backend.convert.vocab import vocab_from_tiktoken
from mla_backend.pretokenizers import PRE_TOKENIZERS
from mla_backend.tokenizer import Tokenizer


def stated(regexes: list[str], ignore_merges: bool = False) -> dict[str, Any]:
    return {"pre_tokenizer": pre_tokenizer(regexes), "model": {"ignore_merges": ignore_merges}}


def first_alike(name: str) -> str:
    """Rows with equal expressions cannot be told apart: the first one stands for them."""
    row = PRE_TOKENIZERS[name]
    return next(
        other
        for other, its in PRE_TOKENIZERS.items()
        if (its.regexes, its.ignore_merges) == (row.regexes, row.ignore_merges)
    )


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_every_pre_tokenizer_is_recognised(name: str) -> None:
    row = PRE_TOKENIZERS[name]
    problems: list[str] = []
    found = recognise(stated(list(row.regexes), row.ignore_merges), problems)
    assert (found, problems) == (first_alike(name), [])


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_the_same_cut_written_differently(name: str) -> None:
    row = PRE_TOKENIZERS[name]
    regexes = [f"(?:{regex})" for regex in row.regexes]
    problems: list[str] = []
    found = recognise(stated(regexes, row.ignore_merges), problems)
    assert (found, problems) == (first_alike(name), [])


def test_escapes_and_digits_are_normalised() -> None:
    tokenizer = stated([])
    steps = tokenizer["pre_tokenizer"]["pretokenizers"]
    regexes = [regex.replace("\r", r"\r") for regex in PRE_TOKENIZERS["deepseek-llm"].regexes]
    assert regexes[-1] == r"\p{N}+"
    tokenizer["pre_tokenizer"]["pretokenizers"] = [
        *pre_tokenizer(regexes[:-1])["pretokenizers"][:-1],
        {"type": "Digits", "individual_digits": True},
        *steps,
    ]
    assert recognise(tokenizer, []) == "deepseek-llm"


def test_byte_level_with_its_own_expression() -> None:
    step = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    assert recognise({"pre_tokenizer": step, "model": {}}, []) == "gpt-2"


@pytest.mark.parametrize(
    "tokenizer",
    [
        stated([r"\w+"]),
        {"pre_tokenizer": None, "model": {}},
        {"pre_tokenizer": {"type": "Metaspace"}, "model": {}},
        {"pre_tokenizer": {"type": "NoSuchStep"}, "model": {}},
        stated(list(PRE_TOKENIZERS["deepseek-v3"].regexes), ignore_merges=True),
    ],
)
def test_unknown_pre_tokenizers(tokenizer: dict[str, Any]) -> None:
    problems: list[str] = []
    assert recognise(tokenizer, problems) is None
    assert "deepseek-v3" in problems[0]
    assert "--pre" in problems[0]


def test_normalizers_are_refused() -> None:
    problems: list[str] = []
    recognise(tokenizer_json() | {"normalizer": {"type": "NFC"}}, problems)
    assert problems == ["tokenizer.json: normalizer: found 'NFC'; accepted: none"]


def keys_of(path: Path, pre: str | None = None) -> tuple[dict[str, Any], list[str]]:
    problems: list[str] = []
    config = json.loads((path / "config.json").read_text())
    return dict(read_tokenizer(path, config, VOCAB, pre, problems)), problems


def test_keys_make_a_tokenizer(tmp_path: Path) -> None:
    keys, problems = keys_of(checkpoint().write(tmp_path))
    assert not problems
    tokenizer = Tokenizer.from_metadata(keys)
    assert tokenizer.add_bos
    ids = tokenizer.encode("in the <eos>then<think>")
    assert tokenizer.decode(ids, skip_special=False) == "<｜bos｜>in the <eos>then<think>"
    assert tokenizer.vocab_size == VOCAB


def test_pre_tokenizer_by_name(tmp_path: Path) -> None:
    source = checkpoint()
    assert source.tokenizer is not None
    source.tokenizer["pre_tokenizer"] = {"type": "Whitespace"}
    path = source.write(tmp_path)
    assert keys_of(path, "gpt-2")[0]["tokenizer.ggml.pre"] == "gpt-2"
    assert "accepted: deepseek-llm" in keys_of(path, "none")[1][0]


def test_merges_in_pairs(tmp_path: Path) -> None:
    source = checkpoint()
    assert source.tokenizer is not None
    source.tokenizer["model"]["merges"] = [["t", "h"], ["th", "e"], [" ", "a"]]
    keys, _ = keys_of(source.write(tmp_path))
    assert keys["tokenizer.ggml.merges"] == ("t h", "th e", "Ġ a")


def test_added_tokens_of_the_settings(tmp_path: Path) -> None:
    source = checkpoint()
    source.settings["added_tokens_decoder"] = {
        "302": {"content": "<think>", "special": True},
        "303": {"content": "a\u2581b", "special": False},
        "301": {"content": "other", "special": True},
    }
    keys, problems = keys_of(source.write(tmp_path))
    assert list(keys["tokenizer.ggml.token_type"][302:304]) == [3, 4]
    assert keys["tokenizer.ggml.tokens"][303] == "a b"
    assert problems == [
        "tokenizer_config.json: added token 301 is 'other', but '<eos>' in tokenizer.json"
    ]


@pytest.mark.parametrize(
    ("settings", "processor", "bos"),
    [
        ({"add_bos_token": False, "bos_token": "<｜bos｜>"}, True, False),
        ({"bos_token": "<｜bos｜>"}, True, True),
        ({"bos_token": "<eos>"}, True, False),
        ({"bos_token": "<｜bos｜>"}, False, None),
    ],
)
def test_bos_flag(
    tmp_path: Path, settings: dict[str, Any], processor: bool, bos: bool | None
) -> None:
    source = checkpoint()
    source.settings = settings
    assert source.tokenizer is not None
    if processor:
        source.tokenizer["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<｜bos｜>"}}, {"Sequence": {"id": "A"}}],
        }
    keys, _ = keys_of(source.write(tmp_path))
    assert keys.get("tokenizer.ggml.add_bos_token") == bos


def test_special_ids(tmp_path: Path) -> None:
    source = checkpoint()
    source.settings["pad_token"] = {"content": "<think>"}
    source.config |= {"eos_token_id": 5, "unk_token_id": 7, "mask_token_id": 999}
    keys, problems = keys_of(source.write(tmp_path))
    ids = {key: value for key, value in keys.items() if key.endswith("_token_id")}
    assert ids == {
        "tokenizer.ggml.bos_token_id": 300,
        "tokenizer.ggml.eos_token_id": 301,  # the text comes before the number
        "tokenizer.ggml.unknown_token_id": 7,
        "tokenizer.ggml.padding_token_id": 302,
    }
    assert problems == ["mask_token_id: found 999; accepted: 0 to 319"]


def test_special_ids_by_text(tmp_path: Path) -> None:
    source = checkpoint()
    source.config["architectures"] = ["Glm4MoeLiteForCausalLM"]
    source.settings["added_tokens_decoder"] = {
        "310": {"content": "[gMASK]", "special": True},
        "311": {"content": "<|user|>", "special": True},
    }
    keys, problems = keys_of(source.write(tmp_path))
    assert not problems
    assert keys["tokenizer.ggml.bos_token_id"] == 310
    assert keys["tokenizer.ggml.eos_token_id"] == 301
    assert keys["tokenizer.ggml.eot_token_id"] == 311
    assert "tokenizer.ggml.eom_token_id" not in keys


def test_templates_in_files_and_by_name(tmp_path: Path) -> None:
    source = checkpoint()
    del source.settings["chat_template"]
    path = source.write(tmp_path)
    assert "tokenizer.chat_template" not in keys_of(path)[0]
    (path / "chat_template.json").write_text(json.dumps({"chat_template": "old"}))
    assert keys_of(path)[0]["tokenizer.chat_template"] == "old"
    (path / "chat_template.jinja").write_text("new")
    assert keys_of(path)[0]["tokenizer.chat_template"] == "new"
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates" / "tool-use.jinja").write_text("tools")
    keys, _ = keys_of(path)
    assert keys["tokenizer.chat_template"] == "new"
    assert keys["tokenizer.chat_template.tool_use"] == "tools"
    assert keys["tokenizer.chat_templates"] == ("tool_use",)


def test_tiktoken(tmp_path: Path) -> None:
    merged = [b"th", b"the", b" the", b"in", "你".encode()[:2], "你".encode()]
    tokens = [*(bytes([i]) for i in range(256)), *merged]
    path = tmp_path / "tiktoken.model"
    path.write_text("".join(f"{base64.b64encode(t).decode()} {i}\n" for i, t in enumerate(tokens)))
    settings = {"added_tokens_decoder": {"262": {"content": "[BOS]", "special": True}}}
    problems: list[str] = []
    vocab = vocab_from_tiktoken(path, settings, 600, problems)
    assert not problems
    characters = byte_characters()
    assert list(vocab.tokens[:256]) == characters
    assert vocab.merges[:4] == ("t h", "th e", "Ġ the", "i n")
    assert len(vocab.merges) == len(merged)
    assert vocab.tokens[262] == "[BOS]"
    assert vocab.tokens[263] == "<|reserved_token_263|>"
    assert vocab.types[262:264] == (3, 3)
    assert vocab.tokens[262 + 258 :] == tuple(f"[PAD{i}]" for i in range(520, 600))

    keys = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "kimi-k2",
        "tokenizer.ggml.tokens": vocab.tokens,
        "tokenizer.ggml.token_type": list(vocab.types),
        "tokenizer.ggml.merges": vocab.merges,
    }
    ids = Tokenizer.from_metadata(keys).encode("in the 你", add_bos=False)
    assert ids == [259, 258, 32, 261]


def test_damaged_tiktoken(tmp_path: Path) -> None:
    path = tmp_path / "tiktoken.model"
    path.write_text("IQ== 0\nIg== 2\n")
    problems: list[str] = []
    vocab_from_tiktoken(path, {}, 10, problems)
    assert problems == ["tiktoken.model: accepted: every rank from 0 once"]
