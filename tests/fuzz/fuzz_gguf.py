"""Mutated GGUF files must end in a model's configuration or in one ModelError, soon and small.

    python tests/fuzz/fuzz_gguf.py --n 10000 --seed 0

Each case damages a small valid file (bits, bytes, cuts, splices, and integers put where the header
keeps lengths, counts, types and offsets) and runs it through reader, configuration and weight
check. Another exception, more than a second, or memory far beyond the file's size is a failure.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import signal
import struct
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mla_backend.config import config_from_gguf
from mla_backend.errors import ModelError
from mla_backend.gguf import read_gguf
from mla_backend.weights import check

from tests.gguf.build import ARRAY, F32, F64, U64, File, Tensor, Typed, build, changed, tiny_model

CASE_LIMIT_S = 1.0
# Parsed strings, dictionaries and error texts of a 10 KB header; a stated length never counts.
MEMORY_LIMIT_BYTES = 4 << 20
_INTERESTING = (
    0, 1, 2, 3, 4, 7, 8, 9, 12, 13, 31, 32, 33, 127, 128, 255, 256, 4096, 65535, 65536, 2**31 - 1,
    2**31, 2**32 - 1, 2**32, 2**40, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 32, 2**64 - 1,
)  # fmt: skip


class Hang(BaseException):
    """A case passed its time; not an Exception, so that nothing swallows it."""


@dataclass
class Summary:
    """What happened to all cases."""

    n_cases: int = 0
    n_accepted: int = 0
    peak_bytes: int = 0
    slowest_s: float = 0.0
    failures: list[str] = field(default_factory=list)


def seeds() -> list[bytes]:
    """Valid files: both layouts, both families, every metadata type, several tensor types."""
    values = {
        "general.alignment": 64,
        "u64": Typed(U64, 2**40),
        "f64": Typed(F64, 0.25),
        "flags": Typed(ARRAY, [True, False, True], 7),
        "scores": Typed(ARRAY, [0.5] * 9, F32),
        "bytes": Typed(ARRAY, list(range(50)), 0),
        "words": ["Ġthe", "", "naïve"],
    }
    tensors = {f"t{index}": Tensor((2, 256), kind) for index, kind in enumerate((0, 1, 2, 8, 12))}
    files = [
        tiny_model("split"),
        tiny_model("legacy"),
        tiny_model("split", sigmoid=True),
        changed(tiny_model(), {"nextn_predict_layers": 0, "logit_scale": 1.0}),
        File(values, tensors, alignment=64),
        File({}, {}, version=2),
    ]
    return [build(file) for file in files]


def header_bytes(data: bytes | bytearray) -> int:
    """Where the mutations concentrate: behind it are only zeros of weights."""
    return len(data.rstrip(b"\0"))


def flip_bits(data: bytearray, rng: random.Random) -> bytearray:
    for _ in range(rng.randint(1, 8)):
        data[rng.randrange(header_bytes(data) or 1)] ^= 1 << rng.randrange(8)
    return data


def put_integer(data: bytearray, rng: random.Random) -> bytearray:
    size, code = rng.choice([(4, "<I"), (8, "<Q")])
    at = rng.randrange(max(1, header_bytes(data) - size))
    number = rng.choice(_INTERESTING) + rng.choice([0, 0, -1, 1])
    data[at : at + size] = struct.pack(code, number % (1 << (8 * size)))
    return data


def put_field(data: bytearray, rng: random.Random) -> bytearray:
    """An integer exactly over one that the file has: the length before some text, or a count."""
    start = rng.randrange(max(1, header_bytes(data) - 8))
    near = range(start, min(start + 100, len(data) - 8))
    found = [at for at in near if 0 < int.from_bytes(data[at : at + 8], "little") < 99]
    at = rng.choice([*found, 4, 8, 16])
    old = int.from_bytes(data[at : at + 8], "little")
    number = rng.choice([old - 1, old + 1, old * 2, *_INTERESTING])
    data[at : at + 8] = struct.pack("<Q", number % 2**64)
    return data


def cut(data: bytearray, rng: random.Random) -> bytearray:
    return data[: rng.randrange(len(data))]


def splice(data: bytearray, rng: random.Random) -> bytearray:
    """Copy, move or drop a piece."""
    size = header_bytes(data) or 1
    start, target = rng.randrange(size), rng.randrange(size)
    piece = data[start : start + rng.randint(1, 200)]
    if rng.random() < 0.5:
        del data[start : start + len(piece)]
    if rng.random() < 0.7:
        data[target:target] = piece
    return data


def put_bytes(data: bytearray, rng: random.Random) -> bytearray:
    at = rng.randrange(header_bytes(data) or 1)
    data[at : at + rng.randint(1, 16)] = rng.randbytes(rng.randint(1, 16))
    return data


MUTATIONS: tuple[Callable[[bytearray, random.Random], bytearray], ...] = (
    flip_bits, put_integer, put_field, put_field, cut, splice, put_bytes,
)  # fmt: skip


def mutate(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        out = rng.choice(MUTATIONS)(out, rng) if out else out
    return bytes(out)


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise Hang in the block once it has run that long."""

    def stop(_signal: int, _frame: FrameType | None) -> None:
        raise Hang

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def run_case(path: Path, summary: Summary) -> str | None:
    """One file; a description of what went wrong, if anything did."""
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    start = time.perf_counter()
    problem = None
    try:
        with time_limit(CASE_LIMIT_S):
            file = read_gguf(path)
            check(config_from_gguf(file), file)
        summary.n_accepted += 1
    except ModelError as error:
        if str(path) not in str(error):
            problem = f"the message does not name the file: {error}"
    except Hang:
        problem = f"still running after {CASE_LIMIT_S} s"
    except Exception as error:  # the very thing looked for
        problem = f"{type(error).__name__}: {error}"
    peak = tracemalloc.get_traced_memory()[1] - before
    summary.peak_bytes = max(summary.peak_bytes, peak)
    summary.slowest_s = max(summary.slowest_s, time.perf_counter() - start)
    if problem is None and peak > MEMORY_LIMIT_BYTES:
        problem = f"{peak} bytes allocated for a file of {path.stat().st_size}"
    return problem


def fuzz(n_cases: int, seed: int, keep: Path | None = None) -> Summary:
    """Run ``n_cases``; failing files go to the folder ``keep``."""
    summary, originals = Summary(), seeds()
    tracemalloc.start()
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "case.gguf"
            for index in range(n_cases):
                rng = random.Random(f"{seed}:{index}")
                data = mutate(rng.choice(originals), rng)
                path.write_bytes(data)
                problem = run_case(path, summary)
                summary.n_cases += 1
                if problem is not None:
                    summary.failures.append(f"seed {seed}, case {index}: {problem}")
                    if keep is not None:
                        (keep / f"fuzz_gguf_{seed}_{index}.gguf").write_bytes(data)
    finally:
        tracemalloc.stop()
    return summary


def main() -> int:
    """Run from the command line; 1 if any case failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=10_000, help="number of cases")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for files that fail")
    arguments = parser.parse_args()
    start = time.perf_counter()
    summary = fuzz(arguments.n, arguments.seed, arguments.keep)
    for failure in summary.failures[:20]:
        print(failure)
    print(
        f"fuzz_gguf: {summary.n_cases} cases in {time.perf_counter() - start:.1f} s, "
        f"{summary.n_accepted} still valid, {len(summary.failures)} failed; slowest "
        f"{summary.slowest_s * 1e3:.0f} ms, peak {summary.peak_bytes / 1024:.0f} KiB"
    )
    return 1 if summary.failures or summary.n_cases == 0 else 0


if __name__ == "__main__":
    raise SystemExit(main())
