"""The command line: its commands, and how errors end it.

Exit status: 0, 1 for errors, 2 for a wrong command line, 130 after Ctrl-C.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence

import typer
from typer.main import get_command

from .commands.bench import bench
from .commands.chat import chat
from .commands.convert import convert
from .commands.demo import demo
from .commands.doctor import doctor
from .commands.grouping import grouped
from .commands.imatrix import imatrix
from .commands.inspect import inspect
from .commands.perplexity import perplexity
from .commands.quantize import quantize
from .commands.run import run
from .commands.synth import synth
from .commands.tune import tune
from .commands.upgrade import upgrade
from .commands.version import version
from .errors import MlaError, UsageError

PROGRAM = "mla-backend"
COMMANDS = (
    run,
    chat,
    demo,
    inspect,
    convert,
    upgrade,
    quantize,
    imatrix,
    perplexity,
    bench,
    tune,
    synth,
    doctor,
    version,
)

# typer brings its own click or uses the installed one: either way, this is its base of everything
# that is wrong with a command line.
_COMMAND_LINE_ERRORS: type = typer.BadParameter.__mro__[1]


def make_app() -> typer.Typer:
    """The program with its commands."""
    app = typer.Typer(
        name=PROGRAM,
        help="Run DeepSeek-family GGUF models through Multi-head Latent Attention.",
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    for command in COMMANDS:
        app.command()(grouped(command))
    return app


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        result = get_command(make_app()).main(
            args=arguments, prog_name=PROGRAM, standalone_mode=False
        )
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except BrokenPipeError:
        return _stop_writing()
    except Exception as error:
        return _report(error, arguments)
    return result if isinstance(result, int) else 0


def _report(error: Exception, arguments: list[str]) -> int:
    """Say what was wrong, in one line where possible."""
    if "--debug" in arguments:
        traceback.print_exception(error)
    hint = ""
    if isinstance(error, (_COMMAND_LINE_ERRORS, UsageError)):
        format_message = getattr(error, "format_message", None)
        message = format_message() if format_message else str(error)
        hint = f"Try '{_help_command(arguments)}'.\n"
        status = 2
    elif isinstance(error, MlaError):
        message, status = str(error), 1
    elif isinstance(error, OSError) and error.filename is not None:
        message, status = f"{os.fsdecode(error.filename)}: {error.strerror}", 1
    else:
        message, status = f"{type(error).__name__}: {error} (--debug shows where)", 1
    sys.stderr.write(f"error: {message}\n{hint}")
    return status


def _help_command(arguments: list[str]) -> str:
    names = [command.__name__ for command in COMMANDS]
    command = next((name for name in arguments[:1] if name in names), None)
    return " ".join([PROGRAM, *([command] if command else []), "--help"])


def _stop_writing() -> int:
    """Nobody reads any more: end quietly, also when the interpreter flushes at its exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1
