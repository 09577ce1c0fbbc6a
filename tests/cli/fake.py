"""A model that says what a test wants, through the real template and splitter."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mla_backend.chat import ChatTemplate
from mla_backend.errors import SessionError
from mla_backend.generator import Chunk, Stats
from mla_backend.threads import Defaults

Script = Sequence[str | BaseException]


class FakeModel:
    """Answers with the next script: pieces of text, or exceptions to raise."""

    def __init__(self, *scripts: Script) -> None:
        self.scripts = list(scripts)
        self.template = ChatTemplate(None, bos_token="", eos_token="")
        self.tokenizer = SimpleNamespace(
            encode=lambda text, add_bos=None: [1] * (len(text) + (add_bos is not False)),
            decode=lambda ids: "x" * len(ids),
        )
        self.n_ctx = 4096
        self.notes = ["a note about the model"]
        self.asked: list[Any] = []
        self.options: list[dict[str, Any]] = []
        self.saved: list[Path] = []
        self.closed_streams = 0
        self.memory = SimpleNamespace(
            weights_mapped_bytes=1,
            weights_copied_bytes=2,
            cache_bytes=3,
            cache_bytes_per_position=4,
            workspace_bytes=5,
            device_bytes=0,
        )
        self.isa = "baseline"
        self.n_threads = 1
        self.n_batch = 512
        self.defaults = Defaults(1, None, "as asked")
        self.numa = SimpleNamespace(mode="off", nodes=())
        self.loaded: list[Any] = []

    def __enter__(self) -> FakeModel:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def stream(self, prompt: Sequence[int], **options: Any) -> Generator[Chunk, None, None]:
        self.asked.append(prompt)
        self.options.append(options)
        return self._stream(self.scripts.pop(0))

    def stream_chat(
        self, messages: Sequence[Mapping[str, str]], **options: Any
    ) -> Generator[Chunk, None, None]:
        self.asked.append([dict(message) for message in messages])
        self.options.append(options)
        return self._stream(self.scripts.pop(0))

    def _stream(self, script: Script) -> Generator[Chunk, None, None]:
        try:
            for index, piece in enumerate(script):
                if isinstance(piece, BaseException):
                    raise piece
                stats = Stats(7, 2, index + 1, 0.5, 0.25)
                reason = "stop" if index == len(script) - 1 else None
                yield Chunk(piece, index, -0.5, ((index, -0.5),), reason, stats)
        finally:
            self.closed_streams += 1

    def save_session(self, path: Path) -> None:
        path.write_bytes(b"context")
        self.saved.append(path)

    def load_session(self, path: Path) -> None:
        if not path.exists():
            raise SessionError(f"{path}: cannot be read")


def load_of(model: FakeModel) -> Callable[..., FakeModel]:
    """A stand-in for ``Model.load``."""
    return lambda path, **options: model
