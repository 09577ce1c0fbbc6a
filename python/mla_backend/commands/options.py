"""The options of all commands, in groups. Names are llama.cpp's where it has the option."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import UsageError

_MODEL, _SAMPLING, _OUTPUT = "Model", "Sampling", "Output"


class CacheType(StrEnum):
    """Types of cached numbers."""

    f32 = "f32"
    f16 = "f16"
    bf16 = "bf16"
    q8_0 = "q8_0"


class Precision(StrEnum):
    """How activations are rounded."""

    fast = "fast"
    exact = "exact"


class Attention(StrEnum):
    """Which of the two contractions attention uses."""

    auto = "auto"
    absorbed = "absorbed"
    expanded = "expanded"


class Layout(Enum):
    """How a file stores the expansion of the latent."""

    split = "split"
    legacy = "legacy"


class Numa(StrEnum):
    """Where weights lie on a machine with several memory nodes."""

    auto = "auto"
    shard = "shard"
    interleave = "interleave"
    off = "off"


def _option(*names: str, panel: str | None = None, **more: Any) -> Any:
    return typer.Option(*names, rich_help_panel=panel, **more)


_NumaOption = Annotated[
    Numa,
    _option(
        "--numa",
        panel=_MODEL,
        help="shard splits weights over memory nodes, each read by its own threads; auto does "
        "where there are several.",
    ),
]
_NumaNodesOption = Annotated[
    str | None,
    _option(
        "--numa-nodes",
        metavar="LIST",
        panel=_MODEL,
        show_default=False,
        help="Nodes to use, as in 0-3,8; with / between groups, 0,1/2,3.",
    ),
]


@dataclass(frozen=True)
class ModelPath:
    """Which model file."""

    model: Annotated[
        Path | None,
        typer.Argument(
            metavar="MODEL", readable=False, help="GGUF file; of a split one, any part."
        ),
    ] = None
    model_option: Annotated[
        Path | None,
        _option("-m", "--model", metavar="MODEL", readable=False, help="The same, as an option."),
    ] = None

    @property
    def path(self) -> Path:
        """The file that was named, once. Raises UsageError otherwise."""
        if self.model is not None and self.model_option is not None:
            raise UsageError(
                f"the model is named twice, {str(self.model)!r} and -m {str(self.model_option)!r}; "
                "accepted: once"
            )
        path = self.model_option if self.model is None else self.model
        if path is None or str(path) in ("", "."):
            raise UsageError("no model is named; expected MODEL or -m MODEL")
        return path

    @property
    def is_named(self) -> bool:
        """Whether there is a model on the command line."""
        return self.model is not None or self.model_option is not None


class HugePages(StrEnum):
    """Whether memory may lie on huge pages."""

    auto = "auto"
    off = "off"


@dataclass(frozen=True)
class ContextOptions:
    """What decides how much memory is taken."""

    ctx_size: Annotated[
        int,
        _option(
            "-c",
            "--ctx-size",
            min=0,
            metavar="N",
            panel=_MODEL,
            help="Positions of the context; 0: as trained, or what memory allows.",
        ),
    ] = 0
    cache_type: Annotated[
        CacheType,
        _option(
            "-ctk",
            "--cache-type-k",
            case_sensitive=False,
            panel=_MODEL,
            help="Type of the cached latents.",
        ),
    ] = CacheType.f16
    batch_size: Annotated[
        int | None,
        _option(
            "-b",
            "--batch-size",
            min=1,
            metavar="N",
            panel=_MODEL,
            show_default=False,
            help="Prompt tokens computed at a time; unset: up to 4096, as memory allows.",
        ),
    ] = None
    precision: Annotated[
        Precision,
        _option(
            "--precision",
            panel=_MODEL,
            help="fast rounds activations to 8 bits or bf16; exact keeps float32.",
        ),
    ] = Precision.fast
    no_mmap: Annotated[
        bool,
        _option("--no-mmap", panel=_MODEL, help="Read the weights into memory, do not map them."),
    ] = False

    @property
    def n_ctx(self) -> int | None:
        """Positions asked for, None where the choice is left open."""
        return self.ctx_size or None


@dataclass(frozen=True)
class ModelOptions:
    """How the model is computed."""

    threads: Annotated[
        int | None,
        _option(
            "-t",
            "--threads",
            min=1,
            metavar="N",
            panel=_MODEL,
            show_default=False,
            help="Threads; unset: as tuned, or one per physical core.",
        ),
    ] = None
    huge_pages: Annotated[
        HugePages,
        _option(
            "--huge-pages",
            panel=_MODEL,
            help="auto asks the system for them; off forbids them to this process.",
        ),
    ] = HugePages.auto
    no_tuned: Annotated[
        bool,
        _option("--no-tuned", panel=_MODEL, help="Ignore what tune found on this machine."),
    ] = False
    attention: Annotated[
        Attention,
        _option(
            "--attention",
            panel=_MODEL,
            help="auto takes the cheaper one for each part of the prompt.",
        ),
    ] = Attention.auto
    isa: Annotated[
        str | None,
        _option(
            "--isa",
            metavar="NAME",
            panel=_MODEL,
            show_default=False,
            help="Instruction set of the kernels; unset: the best one here.",
        ),
    ] = None
    device: Annotated[
        str,
        _option(
            "--device",
            metavar="NAME",
            panel=_MODEL,
            help="cpu, cuda or cuda:N; auto: GPUs where there are any.",
        ),
    ] = "auto"
    gpu_layers: Annotated[
        int | None,
        _option(
            "-ngl",
            "--gpu-layers",
            min=0,
            metavar="N",
            panel=_MODEL,
            show_default=False,
            help="Layers on GPUs, from the last one on; unset: as many as fit.",
        ),
    ] = None
    cpu_moe: Annotated[
        bool, _option("--cpu-moe", panel=_MODEL, help="Keep the experts in host memory.")
    ] = False
    override_tensor: Annotated[
        list[str] | None,
        _option(
            "-ot",
            "--override-tensor",
            metavar="REGEX=DEVICE",
            panel=_MODEL,
            show_default=False,
            help="Put weights whose names match on this device; may be repeated.",
        ),
    ] = None
    tensor_split: Annotated[
        str | None,
        _option(
            "-ts",
            "--tensor-split",
            metavar="A,B,..",
            panel=_MODEL,
            show_default=False,
            help="Parts of the layers for each GPU; unset: the first is filled first.",
        ),
    ] = None
    mlock: Annotated[
        bool, _option("--mlock", panel=_MODEL, help="Keep the mapped weights in memory.")
    ] = False
    numa: _NumaOption = Numa.auto
    numa_nodes: _NumaNodesOption = None
    kv_file: Annotated[
        Path | None,
        _option(
            "--kv-file",
            metavar="FILE",
            readable=False,
            panel=_MODEL,
            show_default=False,
            help="Keep the cache in this file, for contexts larger than memory.",
        ),
    ] = None

    def placement(self) -> dict[str, Any]:
        """Keyword arguments of ``Model.load``. Raises UsageError."""
        pairs = []
        for text in self.override_tensor or ():
            pattern, found, name = text.rpartition("=")
            if not (found and pattern and name):
                raise UsageError(f"--override-tensor {text!r}; accepted is REGEX=DEVICE")
            pairs.append((pattern, name))
        try:
            split = (
                [float(part) for part in self.tensor_split.split(",")]
                if (self.tensor_split is not None)
                else None
            )
        except ValueError:
            raise UsageError(
                f"--tensor-split {self.tensor_split!r}; accepted are numbers, as in 3,1"
            ) from None
        return {
            "device": self.device,
            "gpu_layers": self.gpu_layers,
            "cpu_moe": self.cpu_moe,
            "override_tensor": pairs,
            "tensor_split": split,
            "numa": self.numa.value,
            "numa_nodes": self.numa_nodes,
        }


@dataclass(frozen=True)
class PlacementOptions:
    """A model to be loaded for a look at where it lies."""

    placement: Annotated[
        Path | None,
        _option(
            "--placement",
            metavar="MODEL",
            readable=False,
            show_default=False,
            help="Load this model and show on which memory nodes it lies.",
        ),
    ] = None
    numa: _NumaOption = Numa.auto
    numa_nodes: _NumaNodesOption = None


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are chosen, and when to stop."""

    n_predict: Annotated[
        int,
        _option(
            "-n",
            "--predict",
            "--n-predict",
            min=-2,
            metavar="N",
            panel=_SAMPLING,
            help="Tokens to generate at most; -1: until the model stops or the context is full.",
        ),
    ] = -1
    temp: Annotated[
        float,
        _option(
            "--temp", metavar="T", min=0.0, panel=_SAMPLING, help="Temperature; 0: the likeliest."
        ),
    ] = 0.8
    top_k: Annotated[
        int,
        _option(
            "--top-k", metavar="N", min=0, panel=_SAMPLING, help="Keep this many tokens; 0: all."
        ),
    ] = 40
    top_p: Annotated[
        float,
        _option(
            "--top-p",
            metavar="P",
            min=0.0,
            max=1.0,
            panel=_SAMPLING,
            help="Keep the likeliest tokens that together reach this; 1: all.",
        ),
    ] = 0.95
    min_p: Annotated[
        float,
        _option(
            "--min-p",
            metavar="P",
            min=0.0,
            max=1.0,
            panel=_SAMPLING,
            help="Keep tokens at least this times as likely as the best; 0: all.",
        ),
    ] = 0.05
    repeat_penalty: Annotated[
        float,
        _option(
            "--repeat-penalty",
            metavar="X",
            panel=_SAMPLING,
            help="Penalty of recent tokens; 1: none.",
        ),
    ] = 1.0
    repeat_last_n: Annotated[
        int,
        _option(
            "--repeat-last-n",
            metavar="N",
            min=-1,
            panel=_SAMPLING,
            help="Tokens that count as recent.",
        ),
    ] = 64
    seed: Annotated[
        int,
        _option("-s", "--seed", metavar="N", min=-1, panel=_SAMPLING, help="Random seed; -1: any."),
    ] = -1
    stop: Annotated[
        list[str] | None,
        _option(
            "--stop",
            metavar="TEXT",
            panel=_SAMPLING,
            show_default=False,
            help="End before this text; may be repeated.",
        ),
    ] = None

    @property
    def max_tokens(self) -> int | None:
        """Limit of the tokens generated, None without one."""
        return None if self.n_predict < 0 else self.n_predict

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of ``Model.stream`` and its kin.

        Raises UsageError for values that no sampler takes: ask before a model is loaded.
        """
        from ..sampling import SamplingParams

        given: dict[str, Any] = {
            "stop": tuple(self.stop or ()),
            "temperature": self.temp,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "min_p": self.min_p,
            "repeat_penalty": self.repeat_penalty,
            "repeat_last_n": self.repeat_last_n,
            "seed": None if self.seed < 0 else self.seed,
        }
        SamplingParams(**given)
        return {"max_tokens": self.max_tokens} | given


@dataclass(frozen=True)
class DebugOptions:
    """What every command has."""

    debug: Annotated[
        bool, _option("--debug", panel=_OUTPUT, help="Show where in the program an error arose.")
    ] = False


@dataclass(frozen=True)
class ConsoleOptions(DebugOptions):
    """What is shown beside the answer, on stderr."""

    verbose: Annotated[
        bool, _option("-v", "--verbose", panel=_OUTPUT, help="Show facts of model and memory too.")
    ] = False
    quiet: Annotated[
        bool,
        _option("-q", "--quiet", panel=_OUTPUT, help="Show nothing but the answer and errors."),
    ] = False


@dataclass(frozen=True)
class JsonOptions:
    """Machine-readable output."""

    as_json: Annotated[
        bool, _option("--json", panel=_OUTPUT, help="Print one JSON object on stdout.")
    ] = False
