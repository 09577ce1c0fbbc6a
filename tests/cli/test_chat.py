"""``chat``: turns, thinking, commands, interruption."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import pty
import re
import select
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from cli.conftest import Cli
from cli.fake import FakeModel, load_of
from mla_backend import Model
from mla_backend.commands.dialogue import Dialogue, session_path
from mla_backend.errors import ContextError, SessionError
from mla_backend.thinking import Split

Shown = list[Split]


def dialogue(model: FakeModel, system: str | None = None) -> Dialogue:
    return Dialogue(model, system=system, template_options={})  # type: ignore[arg-type]


def test_turns_are_remembered() -> None:
    model = FakeModel(["Hi", "!"], ["Yes."])
    talk = dialogue(model, system="Be brief.")
    shown: Shown = []
    talk.ask("Hello", shown.append)
    talk.ask("Really?", shown.append)
    assert "".join(split.answer for split in shown) == "Hi!Yes."
    roles = [(message["role"], message["content"]) for message in model.asked[1]]
    assert roles == [
        ("system", "Be brief."),
        ("user", "Hello"),
        ("assistant", "Hi!"),
        ("user", "Really?"),
    ]
    talk.reset()
    assert [message["role"] for message in talk.messages] == ["system"]


def test_thinking_is_shown_apart_and_kept_for_the_template() -> None:
    model = FakeModel(["<thi", "nk>Hm", "m.</th", "ink>\n\nBlue", "."], ["Red."])
    talk = dialogue(model)
    shown: Shown = []
    talk.ask("Colour?", shown.append)
    assert "".join(split.thinking for split in shown) == "Hmm."
    assert "".join(split.answer for split in shown) == "Blue."
    assert talk.messages[-1]["content"] == "<think>Hmm.</think>\n\nBlue."
    prompt = model.template.render(talk.messages)
    assert "Hmm" not in prompt
    assert "Blue." in prompt


def test_interrupted_answer_is_kept() -> None:
    model = FakeModel(["Once upon", KeyboardInterrupt()])
    talk = dialogue(model)
    shown: Shown = []
    with pytest.raises(KeyboardInterrupt):
        talk.ask("Tell", shown.append)
    assert [message["content"] for message in talk.messages] == ["Tell", "Once upon"]
    assert model.closed_streams == 1


def test_interrupted_thinking_is_closed() -> None:
    talk = dialogue(FakeModel(["<think>Well", KeyboardInterrupt()]))
    with pytest.raises(KeyboardInterrupt):
        talk.ask("Tell", lambda split: None)
    assert talk.messages[-1]["content"] == "<think>Well</think>"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ContextError("too long")])
def test_unanswered_question_is_forgotten(error: BaseException) -> None:
    talk = dialogue(FakeModel([error]))
    with pytest.raises(type(error)):
        talk.ask("Tell", lambda split: None)
    assert talk.messages == []


def test_save_and_load(tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    model = FakeModel(["Grün."])
    talk = dialogue(model)
    talk.ask("Farbe?", lambda split: None)
    talk.save(path)
    assert json.loads(path.read_text("utf-8"))["messages"] == talk.messages
    other = dialogue(FakeModel())
    assert other.load(path) is None
    assert other.messages == talk.messages
    session_path(path).unlink()
    assert "cannot be read" in (other.load(path) or "")


@pytest.mark.parametrize(
    "content",
    [
        b"\xff",
        b"{}",
        b"[1]",
        b'{"kind": "mla-backend conversation", "messages": [{"role": 1, "content": ""}]}',
    ],
)
def test_load_refuses_other_files(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "other.json"
    path.write_bytes(content)
    talk = dialogue(FakeModel())
    with pytest.raises(SessionError, match=r"other\.json"):
        talk.load(path)
    assert talk.messages == []


# ---- the command, with lines from a pipe ------------------------------------------------------


def type_lines(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    stdin = SimpleNamespace(buffer=io.BytesIO(data), isatty=lambda: False)
    monkeypatch.setattr(sys, "stdin", stdin)


def test_lines_from_a_pipe(cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = FakeModel(["<think>Hm</think>One."], ["Two."], ["Three."])
    monkeypatch.setattr(Model, "load", load_of(model))
    path = tmp_path / "s.json"
    type_lines(monkeypatch, f"a\\\nb\n\n//x\n/save {path}\n/reset\n/what\n/help\nc\n".encode())
    result = cli("chat", "a.gguf", "--think")
    assert result.status == 0
    assert result.out == "One.Two.Three."
    assert "Hm" in result.err
    assert [messages[-1]["content"] for messages in model.asked] == ["a\nb", "/x", "c"]
    assert [len(messages) for messages in model.asked] == [1, 3, 1]
    assert "there is no command /what" in result.err
    assert "Ctrl-C stops an answer" in result.err
    assert model.saved == [session_path(path)]
    assert model.options[0]["template_options"] == {"thinking": True, "enable_thinking": True}


def test_exit_leaves(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    model = FakeModel()
    monkeypatch.setattr(Model, "load", load_of(model))
    type_lines(monkeypatch, b"/exit\nnever asked\n")
    assert cli("chat", "a.gguf", "-q").status == 0
    assert model.asked == []


def test_errors_end_a_piped_conversation(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Model, "load", load_of(FakeModel([ContextError("too long")])))
    type_lines(monkeypatch, b"hello\nagain\n")
    result = cli("chat", "a.gguf", "-q")
    assert (result.status, result.err) == (1, "error: too long\n")


def test_invalid_line(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Model, "load", load_of(FakeModel()))
    type_lines(monkeypatch, b"h\xff\n")
    result = cli("chat", "a.gguf", "-q")
    assert result.status == 2
    assert "byte 1 of a line (0xff) is not valid UTF-8" in result.err


def test_session_option(cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    model = FakeModel(["One."], ["Two."])
    monkeypatch.setattr(Model, "load", load_of(model))
    for line in (b"a\n", b"b\n"):
        type_lines(monkeypatch, line)
        assert cli("chat", "a.gguf", "-q", "--session", path).status == 0
    assert [message["content"] for message in model.asked[1]] == ["a", "One.", "b"]


# ---- on a terminal, with a real, random model --------------------------------------------------


class Terminal:
    """The command line on a pseudo-terminal."""

    def __init__(self, *arguments: object) -> None:
        command = [sys.executable, "-m", "mla_backend", *(str(item) for item in arguments)]
        self.pid, self._file = pty.fork()
        if self.pid == 0:
            # Tests that run in the background of a shell inherit that it is ignored.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
            os.execv(command[0], command)
        self._seen = ""
        self._ended = False

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._ended:
            os.kill(self.pid, signal.SIGKILL)
            self.status()

    def expect(self, pattern: str, timeout_s: float = 60.0, press: str = "") -> None:
        """Read until ``pattern`` comes; what is before it is passed over.

        One key of ``press`` is sent every second meanwhile, in turn. A prompt shows a moment before
        the keyboard is read, and keys that mean a signal or an end are lost if they come within it.
        A signal also empties the keyboard's queue: readline, if it has just begun to take several
        characters at once, then waits for one more before it heeds the signal.
        """
        deadline = time.monotonic() + timeout_s
        keys = itertools.cycle(press)
        self.send(next(keys, ""))
        while (found := re.search(pattern, self._seen)) is None:
            left = max(deadline - time.monotonic(), 0)
            ready, _, _ = select.select([self._file], [], [], min(left, 1) if press else left)
            if press and not ready and left:
                self.send(next(keys))
                continue
            assert ready, f"{pattern!r} did not come, but {self._seen[-500:]!r}"
            with contextlib.suppress(OSError):  # the process ended
                self._seen += os.read(self._file, 65536).decode("utf-8", "replace")
                continue
            raise AssertionError(f"{pattern!r} did not come, but {self._seen[-500:]!r}")
        self._seen = self._seen[found.end() :]

    def send(self, text: str) -> None:
        os.write(self._file, text.encode())

    def leave(self, timeout_s: float = 60.0) -> int:
        """Press Ctrl-D until the process has ended: its exit status."""
        deadline = time.monotonic() + timeout_s
        while os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            assert time.monotonic() < deadline, "Ctrl-D did not end the process"
            with contextlib.suppress(OSError):  # it ended just now
                self.send("\x04")
            select.select([], [], [], 0.3)
        return self.status()

    def status(self) -> int:
        """Exit status of the process, which has ended or ends now."""
        _, status = os.waitpid(self.pid, 0)
        os.close(self._file)
        self._ended = True
        return os.waitstatus_to_exitcode(status)


# What readline writes around its prompt depends on the terminal.
PROMPT = r"\n[^\n]*> $"


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_terminal(tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    with Terminal("chat", tiny, "-c", 4096, "-n", 5, "-s", 1) as terminal:
        terminal.expect(PROMPT)
        terminal.send("hello\r")
        terminal.expect(r"answer: .*" + PROMPT)
        terminal.send("half a line")
        terminal.expect("half a line")
        terminal.expect(PROMPT, press="\x03!")
        terminal.send("\x1b[A\r")  # the line before, from the history
        terminal.expect(r"reused.*" + PROMPT)
        terminal.send(f"/save {path}\r")
        terminal.expect(r"\(saved 4 messages.*" + PROMPT)
        terminal.send("/reset\r")
        terminal.expect(r"\(a new conversation\).*" + PROMPT)
        terminal.send(f"/load {path}\r")
        terminal.expect(r"\(loaded 4 messages.*" + PROMPT)
        assert terminal.leave() == 0
    messages = json.loads(path.read_text("utf-8"))["messages"]
    assert [message["content"] for message in messages[::2]] == ["hello", "hello"]


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_terminal_interrupt(tiny: Path) -> None:
    options = ("-c", 8192, "--temp", 3, "--top-k", 0, "--top-p", 1, "--min-p", 0)
    with Terminal("chat", tiny, *options) as terminal:
        terminal.expect(PROMPT)
        for _ in range(2):
            terminal.send("hello\r")
            terminal.expect("hello\r\n(?s:.)")  # the answer has begun
            time.sleep(0.2)
            os.kill(terminal.pid, signal.SIGINT)
            # A random model may end its answer by itself before that; the interrupt is then still
            # to come, and one more makes sure that it does not hit the next message.
            terminal.expect(r"(\(stopped\)|tokens/s\))(?s:.*)" + PROMPT)
            terminal.expect(PROMPT, press="\x03")
        assert terminal.leave() == 0
