"""``demo``: the bundled model at work."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from typing import Annotated, Final

import typer

from ..bundled import bundled_model
from .console import Console, stats_text
from .loading import load_model
from .options import ConsoleOptions, ContextOptions, ModelOptions

ABOUT: Final = (
    "the bundled model: 20 million parameters of DeepSeek-V3's architecture, trained on Python's "
    "standard library and its documentation. It continues Python text; it is no assistant"
)
#: They end with a line feed: the model's tokens begin lines, they do not complete indentation.
_PROMPTS: Final = (
    'class Stack:\n    """A container: last in, first out."""\n\n'
    "    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
    "def read_config(path):\n",
)
# A small model repeats itself: the penalty keeps it going, the seed keeps the demo the same.
_SAMPLING: Final = {"temperature": 0.6, "repeat_penalty": 1.1, "seed": 3}


@dataclass(frozen=True)
class DemoOptions:
    """How much of it."""

    predict: Annotated[
        int, typer.Option("-n", "--predict", min=1, metavar="N", help="Tokens of each answer.")
    ] = 96


def demo(
    options: DemoOptions,
    context: ContextOptions,
    model_options: ModelOptions,
    console_options: ConsoleOptions,
) -> None:
    """Show the bundled model at work: it continues two pieces of Python."""
    console = Console(console_options)
    console.note(ABOUT)
    with load_model(bundled_model(), context, model_options, console) as model:
        for prompt in _PROMPTS:
            console.answer(prompt)
            with closing(model.stream(prompt, max_tokens=options.predict, **_SAMPLING)) as stream:
                for chunk in stream:
                    console.answer(chunk.text)
                    stats = chunk.stats
            console.answer("\n\n")
            console.note(stats_text(stats))
