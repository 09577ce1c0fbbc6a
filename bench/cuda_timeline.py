"""Where the time of a decoded token goes: every kernel of a replayed token on a CUDA device.

Usage: python -m bench cuda-timeline MODEL [--depth 64] [--rows 40]

Kernels overlap, so each counts from the end of whatever ended last before it to its own end. The
profiler is PyTorch's, which must be installed; it takes time of its own, a tenth or so.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from mla_backend import Model
from mla_backend.session import Session

_TOKENS = 3
_KINDS = ("kernel", "gpu_memcpy", "gpu_memset")


def main() -> None:
    """Print the kernels of a token: in order, and by name."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--depth", type=int, default=64)
    parser.add_argument("--rows", type=int, default=40, help="of the middle of a token to print")
    options = parser.parse_args()
    with (
        Model.load(options.model, device="cuda", n_ctx=options.depth + 64) as model,
        model.session() as session,
    ):
        session.feed([1] * options.depth)
        for _ in range(4):  # the second one is recorded
            session.feed([1])
        events = _profiled(session)
    steps = _steps(events)
    middle = max(len(steps) // 2 - options.rows // 2, 0)
    for name, us in steps[middle : middle + options.rows]:
        print(f"{us:9.2f}  {name}")
    totals: defaultdict[str, list[float]] = defaultdict(list)
    for name, us in steps:
        totals[name].append(us)
    print(f"\n{len(steps)} kernels and copies, {sum(us for _, us in steps):.0f} us")
    for name, times in sorted(totals.items(), key=lambda item: -sum(item[1])):
        print(f"{len(times):5} x {sum(times) / len(times):7.2f} = {sum(times):8.1f} us  {name}")


def _profiled(session: Session) -> list[dict[str, Any]]:
    """What the device ran for one token, in order of its ends."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(_TOKENS):
            session.feed([1])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        found = json.loads(path.read_text())["traceEvents"]
    events = [event for event in found if event.get("cat") in _KINDS]
    events.sort(key=lambda event: float(event["ts"]) + float(event["dur"]))
    return events[-(len(events) // _TOKENS) :]


def _steps(events: list[dict[str, Any]]) -> list[tuple[str, float]]:
    """(name and grid, us until it ended after the one before)."""
    steps = []
    last = min(float(event["ts"]) for event in events)
    for event in events:
        end = float(event["ts"]) + float(event["dur"])
        name = re.sub(r"void |mla::|cuda::|\(anonymous namespace\)::|\(.*", "", str(event["name"]))
        grid = event.get("args", {}).get("grid", "")
        steps.append((f"{name} {grid}", end - last))
        last = end
    return steps


if __name__ == "__main__":
    main()
