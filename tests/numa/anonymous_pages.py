"""Loads a model, lets it speak, and prints where this process's anonymous pages lie, as JSON."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path

from mla_backend import Model, _core


def anonymous_pages() -> dict[int, int]:
    """Pages by node of mappings without a file. Those of files' private copies are not told."""
    counts: Counter[int] = Counter()
    for line in Path("/proc/self/numa_maps").read_text().splitlines():
        if " anon=" in line and " file=" not in line:
            size = re.search(r"kernelpagesize_kB=(\d+)", line)
            pages = int(size[1]) * 1024 // _core.page_bytes() if size else 1
            for node, n in re.findall(r" N(\d+)=(\d+)", line):
                counts[int(node)] += int(n) * pages
    return dict(counts)


def main(path: str, numa: str) -> None:
    with Model.load(path, n_ctx=256, device="cpu", numa=numa) as model:  # type: ignore[arg-type]
        model.generate([3, 1, 4, 1, 5], max_tokens=3, temperature=0)
        facts = {
            "mode": model.numa.mode,
            "groups": [list(group.nodes) for group in model.numa.groups],
            "cpus": sorted(cpu for group in model.numa.groups for cpu in group.cpus),
            "anonymous": anonymous_pages(),
        }
    sys.stdout.write(json.dumps(facts) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
