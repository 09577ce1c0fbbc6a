"""Memory is there before a token needs it."""

from __future__ import annotations

import resource
import subprocess
import sys

from mla_backend.model import Model

from tests.small_models import small_model

_WITHOUT = """
from mla_backend import _core
from mla_backend.model import Model
import sys
_core.disable_huge_pages()
with Model.load(sys.argv[1], n_ctx=64) as model:
    model.session().feed([1, 2, 3])
print([line.split()[1] for line in open("/proc/self/smaps_rollup") if line.startswith("AnonHuge")])
"""


def n_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def test_decoding_takes_no_page_faults() -> None:
    """In the best of some rounds: the interpreter, and a system short of memory, have theirs."""
    rounds = []
    with Model.load(small_model(), n_ctx=2048, threads=2) as model, model.own_session() as session:
        session.feed([1 + i % 100 for i in range(300)])
        for _ in range(10):
            session.truncate(300)
            before = n_faults()
            for token in range(20):
                session.step(token, lambda _: True)
            rounds.append(n_faults() - before)
    assert min(rounds[1:]) == 0, rounds


def test_huge_pages_can_be_forbidden() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT, str(small_model())],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout.strip() in ("['0']", "[]")
