"""Takes a model's answer apart into what it thought and what it says.

Reasoning models write ``<think>..</think>`` before the answer. Some templates open the block at the
end of the prompt already, so that only the closing tag is generated.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

OPEN_TAG = "<think>"
CLOSE_TAG = "</think>"


class Split(NamedTuple):
    """Two parts of a text; either may be empty."""

    thinking: str
    answer: str


class _State(Enum):
    START = 0
    THINKING = 1
    ANSWER = 2


class ThinkingSplitter:
    """Splits a stream; the tags may be cut anywhere between two pieces.

    Only a block at the very start counts: a later ``<think>`` is part of the answer. Blanks around
    the tags are dropped; a block that is never closed is all thinking.
    """

    def __init__(
        self, *, opened: bool = False, open_tag: str = OPEN_TAG, close_tag: str = CLOSE_TAG
    ) -> None:
        """Start a stream; ``opened`` says that the prompt has opened the block."""
        self._state = _State.THINKING if opened else _State.START
        self._open_tag = open_tag
        self._close_tag = close_tag
        self._held = ""  # not yet known to be a tag, blanks before one, or text
        self._at_start = True  # of the present part, where blanks are dropped

    @property
    def is_thinking(self) -> bool:
        """Whether the stream is inside the block."""
        return self._state is _State.THINKING

    def push(self, text: str) -> Split:
        """Take a piece of text; returns what can be told by now."""
        self._held += text
        if self._state is _State.START and not self._decide_start():
            return Split("", "")
        thinking = self._take_thinking() if self._state is _State.THINKING else ""
        answer = self._take_answer() if self._state is _State.ANSWER else ""
        return Split(thinking, answer)

    def flush(self) -> Split:
        """End the stream; returns what was held back."""
        rest, self._held = self._held, ""
        if self._state is _State.THINKING:
            return Split(self._trim_start(rest.rstrip()), "")
        return Split("", rest)

    def _decide_start(self) -> bool:
        body = self._held.lstrip()
        if body.startswith(self._open_tag):
            self._held = body[len(self._open_tag) :]
            self._state = _State.THINKING
        elif self._open_tag.startswith(body):
            return False
        else:
            self._state = _State.ANSWER
            self._at_start = False  # without a block the text stays as it is
        return True

    def _take_thinking(self) -> str:
        head, tag, rest = self._held.partition(self._close_tag)
        if not tag:
            n_partial = _tail_in_tag(head, self._close_tag)
            head = head[: len(head) - n_partial]
        taken = head.rstrip()
        text = self._trim_start(taken)
        if tag:
            self._held, self._state, self._at_start = rest, _State.ANSWER, True
        else:
            self._held = self._held[len(taken) :]
        return text

    def _take_answer(self) -> str:
        text, self._held = self._held, ""
        return self._trim_start(text)

    def _trim_start(self, text: str) -> str:
        if self._at_start:
            text = text.lstrip()
            self._at_start = text == ""
        return text


def split_thinking(text: str, *, opened: bool = False) -> Split:
    """Split a whole text as :class:`ThinkingSplitter` does."""
    splitter = ThinkingSplitter(opened=opened)
    first, last = splitter.push(text), splitter.flush()
    return Split(first.thinking + last.thinking, first.answer + last.answer)


def opens_thinking(prompt: str, *, open_tag: str = OPEN_TAG) -> bool:
    """Whether a rendered prompt ends inside a block that it has just opened."""
    return prompt.rstrip().endswith(open_tag)


def _tail_in_tag(text: str, tag: str) -> int:
    """Length of the longest end of ``text`` that begins ``tag``."""
    longest = min(len(text), len(tag) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(tag[:n])), 0)
