"""Conversations to prompts: the Jinja template of a GGUF file, rendered in a sandbox.

Templates come with downloaded files, so they are untrusted programs: the sandbox keeps them from
Python's internals, from changing the messages, and bounds ``range``.
"""

from __future__ import annotations

import datetime
import json
import traceback
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NoReturn

from .errors import TemplateError
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    import jinja2

KEY = "tokenizer.chat_template"

# For files without a template. Both drop the thinking of earlier answers, as the publishers do.
_ANSWER = "{%- set answer = (message.content or '').split('</think>')[-1] -%}"
_OTHER_ROLES = (
    "{%- elif message.role != 'system' -%}"
    "{{- raise_exception('the built-in template has no role ' ~ message.role) -}}"
    "{%- endif -%}{%- endfor -%}"
)

# Turns marked by the control tokens of V2.5, V3 and R1; system messages come first, joined.
_MARKED = (
    "{{- bos_token -}}"
    "{%- for message in messages if message.role == 'system' -%}"
    "{{- ('' if loop.first else '\\n\\n') + message.content -}}"
    "{%- endfor -%}"
    "{%- for message in messages -%}"
    "{%- if message.role == 'user' -%}{{- '<｜User｜>' + message.content -}}"
    "{%- elif message.role == 'assistant' -%}"
    + _ANSWER
    + "{{- '<｜Assistant｜>' + answer + eos_token -}}"
    + _OTHER_ROLES
    + "{%- if add_generation_prompt -%}{{- '<｜Assistant｜>' -}}{%- endif -%}"
)

# Turns marked in plain words, as V2 does: for vocabularies without those control tokens.
_PLAIN = (
    "{{- bos_token -}}"
    "{%- for message in messages -%}"
    "{%- if message.role == 'system' -%}{{- message.content + '\\n\\n' -}}"
    "{%- elif message.role == 'user' -%}{{- 'User: ' + message.content + '\\n\\n' -}}"
    "{%- elif message.role == 'assistant' -%}"
    + _ANSWER
    + "{{- 'Assistant: ' + answer + eos_token -}}"
    + _OTHER_ROLES
    + "{%- if add_generation_prompt -%}{{- 'Assistant:' -}}{%- endif -%}"
)


class ChatTemplate:
    """One chat template, compiled at its first use.

    Attributes:
        source: the Jinja source.
        is_builtin: whether the file had none, so that the source is ours.
        bos_token, eos_token: texts given to the template under these names.
    """

    def __init__(self, source: str | None, *, bos_token: str, eos_token: str) -> None:
        """Keep the source; None takes the built-in one with DeepSeek's role tokens."""
        self.source = _MARKED if source is None else source
        self.is_builtin = source is None
        self.bos_token = bos_token
        self.eos_token = eos_token

    @classmethod
    def from_metadata(
        cls,
        metadata: Mapping[str, object],
        *,
        bos_token: str,
        eos_token: str,
        name: str | None = None,
    ) -> ChatTemplate:
        """Take a template out of a GGUF file's metadata.

        Args:
            metadata: the file's keys.
            bos_token, eos_token: their texts; empty where the file has none.
            name: one of :func:`template_names`; None is the unnamed template or, where the file
                has none, the built-in one that fits its vocabulary.

        Raises:
            TemplateError: the name is unknown, or the key holds no text.
        """
        key = KEY if name is None else f"{KEY}.{name}"
        source = metadata.get(key)
        if source is None and name is None:
            source = metadata.get(f"{KEY}.default")
        if source is None and name is not None:
            known = ", ".join(template_names(metadata)) or "none"
            raise TemplateError(f"chat template {name!r} is not in the file; named ones: {known}")
        if source is not None and not isinstance(source, str):
            raise TemplateError(f"{key} is {type(source).__name__}; expected a string")
        template = cls(source, bos_token=bos_token, eos_token=eos_token)
        if source is None and not _has_role_tokens(metadata):
            template.source = _PLAIN
        return template

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        **extra: object,
    ) -> str:
        """The prompt for a conversation.

        Args:
            messages: turns with at least ``role``; what else they need is up to the template.
            add_generation_prompt: end with what opens the assistant's next turn.
            extra: further variables, such as ``tools`` or ``thinking``; they win over the
                standard ones.

        Raises:
            TemplateError: the template is invalid or refuses the conversation; the message names
                the template's line.
        """
        for index, message in enumerate(messages):
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise TemplateError(
                    f"message {index}: expected a mapping with a 'role', {message!r}"
                )
        variables: dict[str, object] = {
            "messages": list(messages),
            "add_generation_prompt": add_generation_prompt,
            "bos_token": self.bos_token,
            "eos_token": self.eos_token,
            "tools": None,
            "documents": None,
            **extra,
        }
        template = self._template
        try:
            return template.render(variables)
        except Exception as error:  # the template is a program and may fail in any way
            raise _template_error(error) from error

    @cached_property
    def _template(self) -> jinja2.Template:
        try:
            return _environment().from_string(self.source)
        except Exception as error:  # syntax errors, and nesting that is too deep to compile
            raise _template_error(error) from error


def template_names(metadata: Mapping[str, object]) -> list[str]:
    """Names of the named templates in a GGUF file, sorted."""
    return sorted(key.removeprefix(KEY + ".") for key in metadata if key.startswith(KEY + "."))


def encode_chat(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a rendered conversation, with one BOS where the file wants it, never two.

    Raises:
        TokenizerError: as :meth:`Tokenizer.encode`.
    """
    has_bos = tokenizer.bos_token != "" and text.startswith(tokenizer.bos_token)
    return tokenizer.encode(text, add_bos=False if has_bos else None)


def _has_role_tokens(metadata: Mapping[str, object]) -> bool:
    tokens = metadata.get("tokenizer.ggml.tokens")
    return isinstance(tokens, Collection) and "<｜User｜>" in tokens


def _environment() -> jinja2.Environment:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", _generation_tag()],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _generation_tag() -> type[Any]:
    """``{% generation %}`` marks answers for training; here its body is simply printed."""
    from jinja2 import nodes, parser
    from jinja2.ext import Extension

    class GenerationTag(Extension):
        tags: set[str] = {"generation"}  # noqa: RUF012

        def parse(self, parser: parser.Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    return GenerationTag


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the HTML escapes of Jinja's own filter, which models were not trained on."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(layout: str) -> str:
    return datetime.datetime.now().strftime(layout)


def _template_error(error: Exception) -> TemplateError:
    line = getattr(error, "lineno", None)  # syntax errors carry it
    for frame in traceback.extract_tb(error.__traceback__):
        if frame.filename == "<template>":
            line = frame.lineno
    where = f"chat template, line {line}" if line else "chat template"
    known = isinstance(error, TemplateError) or type(error).__module__.startswith("jinja2")
    what = str(error) if known else f"{type(error).__name__}: {error}"
    return TemplateError(f"{where}: {what}")
