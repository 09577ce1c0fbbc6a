"""Chat templates: reference renderings, the sandbox, errors, BOS, and thinking split off."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mla_backend.chat import ChatTemplate, encode_chat, template_names
from mla_backend.errors import TemplateError
from mla_backend.thinking import Split, ThinkingSplitter, opens_thinking, split_thinking
from mla_backend.tokenizer import Tokenizer
from mla_backend.vocabulary import Vocabulary, byte_alphabet

FIXTURES = os.environ.get("MLA_FIXTURES", "")
BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "<think>\nHm\n</think>Hello"},
    {"role": "user", "content": "Bye"},
]


def template(source: str | None) -> ChatTemplate:
    return ChatTemplate(source, bos_token=BOS, eos_token=EOS)


def render(source: str, messages: list[dict[str, Any]] | None = None, **extra: Any) -> str:
    return template(source).render(TALK if messages is None else messages, **extra)


@pytest.mark.parametrize("model", ["tiny-v2", "tiny-v3"])
def test_reference_chats(model: str) -> None:
    if not FIXTURES:
        pytest.skip("needs the reference models: set MLA_FIXTURES")
    from mla_backend.gguf import read_gguf

    folder = Path(FIXTURES) / model
    path = min((folder / "gguf").glob("*.gguf"), key=lambda p: p.stat().st_size)
    metadata = read_gguf(path).metadata
    tokenizer = Tokenizer.from_metadata(metadata)
    chat = ChatTemplate.from_metadata(
        metadata, bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token
    )
    assert not chat.is_builtin
    cases = json.loads((folder / "expected" / "tokenizer.json").read_text("utf-8"))["chat"]
    for case in cases:
        text = chat.render(case["messages"], add_generation_prompt=case["add_generation_prompt"])
        assert text == case["text"]
        assert encode_chat(tokenizer, text) == case["ids"]


# ---- what templates may use


def test_blocks_are_trimmed() -> None:
    source = (
        "{% for m in messages %}\n    {% if true %}\n{{ m.role }}\n    {% endif %}\n{% endfor %}"
    )
    assert render(source) == "system\nuser\nassistant\nuser\n"


def test_variables() -> None:
    assert render("{{ bos_token }}|{{ eos_token }}|{{ add_generation_prompt }}") == (
        f"{BOS}|{EOS}|True"
    )
    assert render("{{ tools is none }}{{ undefined_name }}") == "True"
    assert render("{{ thinking }} {{ tools[0] }}", thinking=True, tools=["t"]) == "True t"
    assert render("{{ bos_token }}", bos_token="other") == "other"


def test_tojson_is_plain_json() -> None:
    value = {"b": "é <&'> 你", "a": [1, None, True]}
    assert render("{{ v | tojson }}", v=value) == '{"b": "é <&\'> 你", "a": [1, null, true]}'
    assert json.loads(render("{{ v | tojson(indent=2, sort_keys=true) }}", v=value)) == value
    assert "\n" in render("{{ v | tojson(indent=2) }}", v=value)


def test_strftime_now() -> None:
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", render("{{ strftime_now('%Y-%m-%d') }}"))


def test_loop_controls_and_namespace() -> None:
    source = (
        "{% set ns = namespace(n=0) %}{% for i in range(9) %}{% if i == 1 %}{% continue %}"
        "{% endif %}{% if i > 3 %}{% break %}{% endif %}{% set ns.n = ns.n + i %}{% endfor %}"
        "{{ ns.n }}"
    )
    assert render(source) == "5"


def test_generation_tag_prints_its_body() -> None:
    source = (
        "a{% generation %}{% for m in messages[:1] %}{{ m.role }}{% endfor %}{% endgeneration %}b"
    )
    assert render(source) == "asystemb"


# ---- errors


def test_refusal_names_the_line() -> None:
    with pytest.raises(TemplateError, match=r"line 3: roles must alternate"):
        render("a\nb\n{{ raise_exception('roles must alternate') }}")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("ok\n{% if %}", "line 2: Expected an expression"),
        ("{% endfor %}", "line 1"),
        ("{% nonsense %}", "nonsense"),
        ("a\n\n{{ messages[0].content + none }}", "line 3: TypeError"),
        ("{{ messages[0].x.y }}", "has no attribute"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{% for i in range(10**9) %}{% endfor %}", "OverflowError: .*too big"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "not safely callable|unsafe"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ " + "(" * 5000 + ")" * 5000 + " }}", "chat template"),
    ],
)
def test_errors(source: str, message: str) -> None:
    with pytest.raises(TemplateError, match=message):
        render(source)


def test_messages_are_not_changed() -> None:
    messages: list[dict[str, Any]] = [{"role": "user", "content": ["x"]}]
    with pytest.raises(TemplateError):
        render("{{ messages[0].content.append('y') }}", messages)
    assert messages == [{"role": "user", "content": ["x"]}]


@pytest.mark.parametrize("message", ["hello", {"content": "x"}, {"role": 3}])
def test_malformed_messages(message: Any) -> None:
    with pytest.raises(TemplateError, match=r"message 1: expected a mapping with a 'role'"):
        render("x", [{"role": "user"}, message])


def test_invalid_template_only_matters_when_used() -> None:
    broken = template("{% if %}")
    assert broken.source == "{% if %}"
    with pytest.raises(TemplateError):
        broken.render(TALK)


# ---- choice


def test_named_templates() -> None:
    metadata = {"tokenizer.chat_template": "main", "tokenizer.chat_template.tool_use": "tools"}
    tokens = {"bos_token": BOS, "eos_token": EOS}
    assert template_names(metadata) == ["tool_use"]
    assert ChatTemplate.from_metadata(metadata, **tokens).render([]) == "main"
    assert ChatTemplate.from_metadata(metadata, name="tool_use", **tokens).render([]) == "tools"
    with pytest.raises(TemplateError, match=r"'rag' is not in the file; named ones: tool_use"):
        ChatTemplate.from_metadata(metadata, name="rag", **tokens)
    with pytest.raises(TemplateError, match="int; expected a string"):
        ChatTemplate.from_metadata({"tokenizer.chat_template": 3}, **tokens)
    only = {"tokenizer.chat_template.default": "by name"}
    assert ChatTemplate.from_metadata(only, **tokens).render([]) == "by name"


def test_builtin_with_role_tokens() -> None:
    metadata = {"tokenizer.ggml.tokens": ["a", "<｜User｜>"]}
    chat = ChatTemplate.from_metadata(metadata, bos_token=BOS, eos_token=EOS)
    assert chat.is_builtin
    expected = f"{BOS}Be brief.<｜User｜>Hi<｜Assistant｜>Hello{EOS}<｜User｜>Bye"
    assert chat.render(TALK) == template(None).render(TALK) == expected + "<｜Assistant｜>"
    assert chat.render(TALK, add_generation_prompt=False) == expected


def test_builtin_in_plain_words() -> None:
    chat = ChatTemplate.from_metadata({}, bos_token=BOS, eos_token=EOS)
    assert chat.is_builtin
    expected = f"{BOS}Be brief.\n\nUser: Hi\n\nAssistant: Hello{EOS}User: Bye\n\nAssistant:"
    assert chat.render(TALK) == expected


@pytest.mark.parametrize("metadata", [{}, {"tokenizer.ggml.tokens": ["<｜User｜>"]}])
def test_builtin_refuses_other_roles(metadata: dict[str, object]) -> None:
    chat = ChatTemplate.from_metadata(metadata, bos_token="", eos_token="")
    with pytest.raises(TemplateError, match="no role tool"):
        chat.render([{"role": "tool", "content": "x"}])


# ---- BOS


@pytest.mark.parametrize("add_bos", [True, False])
def test_bos_is_never_doubled(add_bos: bool) -> None:
    tokens = [*byte_alphabet(), BOS]
    vocabulary = Vocabulary(tokens, [1] * 256 + [3], {"bos": 256})
    tokenizer = Tokenizer(vocabulary, [], pre="deepseek-v3", add_bos=add_bos)
    x = tokens.index("x")
    assert encode_chat(tokenizer, f"{BOS}x") == [256, x]
    assert encode_chat(tokenizer, "x") == ([256, x] if add_bos else [x])


# ---- thinking


@pytest.mark.parametrize(
    ("text", "opened", "thinking", "answer"),
    [
        ("plain", False, "", "plain"),
        ("  plain <think>x</think>", False, "", "  plain <think>x</think>"),
        ("<think>\nHm.\n</think>\n\nHi ", False, "Hm.", "Hi "),
        ("\n<think>a b</think>c", False, "a b", "c"),
        ("<think></think>c", False, "", "c"),
        ("<think>never closed ", False, "never closed", ""),
        ("Hm.\n</think>\n\nHi", True, "Hm.", "Hi"),
        ("still ", True, "still", ""),
        ("a</thin</think>b</think>", True, "a</thin", "b</think>"),
        ("<thin", False, "", "<thin"),
        ("", False, "", ""),
        ("", True, "", ""),
    ],
)
def test_split_thinking(text: str, opened: bool, thinking: str, answer: str) -> None:
    assert split_thinking(text, opened=opened) == Split(thinking, answer)


PARTS = st.lists(
    st.sampled_from(["<think>", "</think>", "<", "</th", "ink>", " ", "\n", "a", "bc"]), max_size=12
)


@given(parts=PARTS, opened=st.booleans())
def test_splitting_does_not_depend_on_the_pieces(parts: list[str], opened: bool) -> None:
    text = "".join(parts)
    whole = split_thinking(text, opened=opened)
    for pieces in (parts, list(text)):
        splitter = ThinkingSplitter(opened=opened)
        splits = [*map(splitter.push, pieces), splitter.flush()]
        assert "".join(s.thinking for s in splits) == whole.thinking
        assert "".join(s.answer for s in splits) == whole.answer


def test_stream_is_prompt() -> None:
    splitter = ThinkingSplitter()
    steps = [
        ("<think>let", Split("let", ""), True),
        (" me </th", Split(" me", ""), True),
        ("ink>\n", Split("", ""), False),
        ("yes", Split("", "yes"), False),
    ]
    for piece, expected, is_thinking in steps:
        assert splitter.push(piece) == expected
        assert splitter.is_thinking == is_thinking
    assert splitter.flush() == Split("", "")


def test_other_tags() -> None:
    splitter = ThinkingSplitter(open_tag="◁think▷", close_tag="◁/think▷")
    assert splitter.push("◁think▷a◁/think▷b") == Split("a", "b")


def test_prompt_that_opens_thinking() -> None:
    assert opens_thinking("<｜Assistant｜><think>\n")
    assert not opens_thinking("<｜Assistant｜></think>")
    assert not opens_thinking("<｜Assistant｜>")
