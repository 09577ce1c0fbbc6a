"""What was found out about this machine, kept between runs: a small file in the user's cache.

    {"version": 1, "machines": {MACHINE: {"threads": N, "models": {MODEL: {...}}}}}

A machine is known by its processor, its usable cores, nodes and instruction set; a model by its
shape, its formats and its size, wherever its file lies. Whatever is wrong with the file costs a
note, never a model.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from mla_backend import _core
from mla_backend.config import ModelConfig
from mla_backend.gguf import TensorInfo
from mla_backend.limits import cpu_name

_VERSION: Final = 1
_MOST_THREADS: Final = 4096
_MOST_BATCH: Final = 1 << 20
_NO_HOME: Final = "tuned settings have no place: this user has no home; set XDG_CACHE_HOME"


@dataclass(frozen=True)
class Tuned:
    """The best settings of one model on one machine.

    Attributes:
        threads: None where threads belong to nodes, whose cores they are.
        n_batch: tokens of a prompt computed at a time.
        cache_type: a recommendation; it is never applied by itself.
        when: the day, as in 2026-11-23.
    """

    threads: int | None
    n_batch: int
    cache_type: str
    when: str

    @property
    def text(self) -> str:
        """``threads 14, batch 2048: tuned on 2026-11-23``."""
        threads = f"threads {self.threads}, " if self.threads is not None else ""
        return f"{threads}batch {self.n_batch}: tuned on {self.when}"


def tuned_path() -> Path | None:
    """Where the file is: in $XDG_CACHE_HOME, or ~/.cache; None where neither is known."""
    base = os.environ.get("XDG_CACHE_HOME") or ""
    try:
        root = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    except RuntimeError:  # a user without a home directory
        return None
    return root / "mla_backend" / "tuned.json"


def machine_key() -> str:
    """``AMD EPYC 9R14; 16 cores of 32 CPUs; 2 nodes; avx512bf16``."""
    nodes = len(_core.read_topology("").nodes)
    cores, cpus = _core.usable_physical_cores(), len(_core.usable_cpus())
    isa = _core.available_isas()[0]
    return f"{cpu_name()}; {cores} cores of {cpus} CPUs; {nodes} nodes; {isa}"


def model_key(config: ModelConfig, infos: Iterable[TensorInfo]) -> str:
    """``27 layers of 2048, 16 heads, 64 experts, F32+Q4_K+Q6_K, 10364416256 bytes``."""
    infos = list(infos)
    experts = f"{config.moe.n_expert} experts" if config.moe is not None else "dense"
    formats = "+".join(sorted({info.format for info in infos}))
    n_bytes = sum(info.n_bytes for info in infos)
    shape = f"{config.n_layer} layers of {config.d_model}, {config.n_head} heads, {experts}"
    return f"{shape}, {formats}, {n_bytes} bytes"


class TunedFile:
    """The file's entry of one machine.

    Attributes:
        problem: what is wrong with the file, for the user; "" where nothing is.
    """

    def __init__(self, path: Path | None = None, machine: str | None = None) -> None:
        self.path = path if path is not None else tuned_path()
        self.machine = machine if machine is not None else machine_key()
        self.problem = "" if self.path is not None else _NO_HOME
        self._machines = self._read()

    @property
    def threads(self) -> int | None:
        """How many threads a quick probe of the machine chose."""
        n_threads = self._entry().get("threads")
        return n_threads if _is_count(n_threads, _MOST_THREADS) else None

    def find(self, model: str) -> Tuned | None:
        """What was stored of this model; None where nothing was, or nothing that makes sense."""
        models = self._entry().get("models")
        entry = models.get(model) if isinstance(models, dict) else None
        if not isinstance(entry, dict):
            return None
        threads, n_batch = entry.get("threads"), entry.get("n_batch")
        cache_type, when = entry.get("cache_type"), entry.get("when")
        if not (threads is None or _is_count(threads, _MOST_THREADS)):
            return None
        if not _is_count(n_batch, _MOST_BATCH) or not isinstance(n_batch, int):
            return None
        if not isinstance(cache_type, str) or not isinstance(when, str):
            return None
        return Tuned(threads, n_batch, cache_type, when)

    def store_threads(self, n_threads: int) -> None:
        """Keep what the probe chose. Raises OSError where the file cannot be written."""
        self._write({"threads": n_threads})

    def store(self, model: str, tuned: Tuned) -> None:
        """Keep the settings of a model. Raises OSError where the file cannot be written."""
        models = self._entry().get("models")
        self._write(
            {"models": {**(models if isinstance(models, dict) else {}), model: asdict(tuned)}}
        )

    def _entry(self) -> dict[str, Any]:
        entry = self._machines.get(self.machine)
        return entry if isinstance(entry, dict) else {}

    def _read(self) -> dict[str, Any]:
        if self.path is None:
            return {}
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, RecursionError) as error:
            self.problem = f"{self.path} is ignored: {error}"
            return {}
        version = content.get("version") if isinstance(content, dict) else None
        machines = content.get("machines") if isinstance(content, dict) else None
        if version != _VERSION or not isinstance(machines, dict):
            self.problem = f"{self.path} is ignored: it is of another version, or damaged"
            return {}
        return machines

    def _write(self, changes: dict[str, Any]) -> None:
        """Change the machine's entry, in one step for whoever reads meanwhile."""
        if self.path is None:
            raise OSError(_NO_HOME)
        problem = self.problem
        self._machines = self._read()  # another process may have stored something
        self.problem = problem
        self._machines[self.machine] = {**self._entry(), **changes}
        content = {"version": _VERSION, "machines": self._machines}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix="tuned.", dir=self.path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(content, file, indent=1)
                file.write("\n")
            os.replace(name, self.path)
        except BaseException:
            with suppress(OSError):
                os.unlink(name)
            raise


def _is_count(value: object, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most
