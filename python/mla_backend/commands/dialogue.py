"""A conversation with a model: its messages, and the context that they left in the cache."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import SessionError
from ..thinking import CLOSE_TAG, Split, ThinkingSplitter, opens_thinking

if TYPE_CHECKING:
    from ..generator import Chunk
    from ..model import Model

Message = dict[str, str]
#: What a saved conversation says it is.
_KIND = "mla-backend conversation"


class Dialogue:
    """Turns of one conversation.

    The whole conversation is rendered for every turn; the model computes only what its context
    does not hold yet.

    Attributes:
        messages: turns so far, ``{"role", "content"}``; the content of answers includes the
            thinking, which templates drop from earlier turns.
    """

    def __init__(
        self, model: Model, *, system: str | None, template_options: Mapping[str, Any]
    ) -> None:
        self._model = model
        self._system = system
        self._template_options = dict(template_options)
        self.messages: list[Message] = []
        self.reset()

    def reset(self) -> None:
        """Forget all turns; the system message stays."""
        self.messages = [] if self._system is None else [_message("system", self._system)]

    def ask(self, text: str, show: Callable[[Split], None], **options: Any) -> Chunk:
        """Add a question and its answer, which ``show`` gets piece by piece.

        Args:
            options: of ``Model.stream_chat``.

        Returns:
            The last chunk.

        Raises:
            KeyboardInterrupt: what was answered by then is kept. Without any of it, the question
                is forgotten too, as after every error.
        """
        messages = [*self.messages, _message("user", text)]
        prompt = self._model.template.render(messages, **self._template_options)
        splitter = ThinkingSplitter(opened=opens_thinking(prompt))
        stream = self._model.stream_chat(
            messages, template_options=self._template_options, **options
        )
        answer, last = "", None
        try:
            with closing(stream):
                for last in stream:
                    answer += last.text
                    show(splitter.push(last.text))
        finally:
            show(splitter.flush())
            if splitter.is_thinking:  # a block without an end would not be dropped later on
                answer += CLOSE_TAG
            if last is not None:
                self.messages = [*messages, _message("assistant", answer)]
        assert last is not None, "a stream has one chunk at least"
        return last

    def save(self, path: Path) -> None:
        """Write the messages as JSON, and the context beside them under ``session_path``.

        Raises OSError or SessionError where this fails.
        """
        saved = {"kind": _KIND, "messages": self.messages}
        path.write_text(json.dumps(saved, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        self._model.save_session(session_path(path))

    def load(self, path: Path) -> str | None:
        """Take the place of this conversation by a saved one.

        Returns:
            Why the saved context is of no use, so that all turns have to be computed again; None
            where it serves.

        Raises:
            SessionError: the file holds no conversation. OSError: it cannot be read.
        """
        self.messages = _read_messages(path)
        try:
            self._model.load_session(session_path(path))
        except SessionError as error:
            return str(error)
        return None


def session_path(path: Path) -> Path:
    """Where the context of a conversation saved in ``path`` lies."""
    return path.with_name(path.name + ".session")


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _read_messages(path: Path) -> list[Message]:
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # no UTF-8, or no JSON
        raise SessionError(f"{path}: no saved conversation: {error}") from error
    messages = saved.get("messages") if isinstance(saved, dict) else None
    if not isinstance(messages, list) or saved.get("kind") != _KIND:
        raise SessionError(f"{path}: no saved conversation; expected what /save wrote")
    for message in messages:
        if not isinstance(message, dict) or not all(
            isinstance(message.get(key), str) for key in ("role", "content")
        ):
            raise SessionError(f"{path}: found {message!r}; expected a role and a content")
    return messages
