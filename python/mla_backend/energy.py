"""Joules that processors took, where they can be read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mla_backend.nvml import Gpu

_POWERCAP: Final = Path("/sys/class/powercap")


@dataclass
class _Package:
    """One CPU package's counter, in microjoules, which starts anew at ``range_uj``."""

    counter: Path
    range_uj: int
    last_uj: int
    total_uj: int = 0

    def read_j(self) -> float:
        now = int(self.counter.read_text())
        passed = now - self.last_uj
        self.total_uj += passed if passed >= 0 else passed + self.range_uj
        self.last_uj = now
        return self.total_uj / 1e6


class EnergyMeter:
    """Counts what CPU packages (RAPL) and GPUs (NVML) take, all work on them included.

    Attributes:
        sources: what is counted, such as "RAPL package-0"; empty where nothing can be read.
        problem: why CPU packages are not counted; "" where they are.
    """

    def __init__(self, gpus: Sequence[Gpu] = (), root: Path = _POWERCAP) -> None:
        """``root``: where the kernel shows its power domains."""
        self._gpus = [gpu for gpu in gpus if gpu.energy_j() is not None]
        self._packages, names, self.problem = _packages(root)
        self.sources = [*names, *(f"NVML {gpu.name}" for gpu in self._gpus)]

    def read_j(self) -> float | None:
        """Joules so far; differences count. None where nothing can be read.

        Read at least every few minutes: the counters start anew.
        """
        if not self.sources:
            return None
        gpus = sum(gpu.energy_j() or 0.0 for gpu in self._gpus)
        return gpus + sum(package.read_j() for package in self._packages)


def _packages(root: Path) -> tuple[list[_Package], list[str], str]:
    """The counters of whole packages (their parts would be counted twice), and their names."""
    packages, names = [], []
    problem = f"energy: no counters in {root}"
    for domain in sorted(root.glob("intel-rapl:*")):
        if domain.name.count(":") != 1:
            continue
        counter = domain / "energy_uj"
        try:
            name = (domain / "name").read_text().strip()
            if not name.startswith("package"):  # psys counts packages, and more
                continue
            most = int((domain / "max_energy_range_uj").read_text())
            packages.append(_Package(counter, most, int(counter.read_text())))
        except PermissionError:
            problem = f"energy: {counter} may not be read by this user"
        except (OSError, ValueError):
            problem = f"energy: {counter} cannot be read"
        else:
            names.append(f"RAPL {name}")
    return packages, names, "" if packages else problem
