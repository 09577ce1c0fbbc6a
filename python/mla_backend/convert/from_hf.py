"""From a checkpoint directory to a GGUF file, in one pass and straight to the target type."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from mla_backend import _core

from ..config import Layout
from ..errors import UsageError
from ..gguf.writer import NewTensor
from .checkpoint import Checkpoint, listed, open_checkpoint, raise_all
from .decode import FLOAT_DTYPES, FP8_DTYPE, SCALE_DTYPES, Source, scale_shape
from .estimate import estimate
from .folding import folded
from .hf_config import HfConfig, read_config
from .hf_tokenizer import read_tokenizer
from .metadata import metadata
from .mixes import Mix, MixFacts, mix_named, tensor_format
from .names import Target, declare, has_layer, is_left_out
from .output import OutputPlan, Progress, identity_of, plan_output, write_output
from .pieces import Piece, Recipe, cut, make
from .safetensors import StoredTensor

_SCALE_SUFFIX: Final = "_scale_inv"
_AUTO: Final = "auto"


@dataclass(frozen=True)
class ConvertOptions:
    """What a conversion makes of a checkpoint.

    Attributes:
        outtype: a file type of ``mixes``, or "auto": the 16-bit type nearest to the checkpoint's.
        layout: "split" for attn_k_b and attn_v_b, "legacy" for the joint attn_kv_b.
        keep_nextn: keep the prediction layers, where the checkpoint has them.
        max_shard_bytes: where to split the file; None writes one.
        name: the model's name; None takes it from the checkpoint.
        pre: name of the pre-tokenizer; None recognises it.
        threads: None takes one per core.
    """

    outtype: str = _AUTO
    layout: Layout = "split"
    keep_nextn: bool = True
    max_shard_bytes: int | None = None
    name: str | None = None
    pre: str | None = None
    threads: int | None = None


@dataclass(frozen=True)
class ConversionPlan:
    """A conversion that was checked and can be carried out.

    Attributes:
        outtype: the file type, never "auto".
        output: the files.
        recipes: how each tensor is made, in file order.
        n_nextn: prediction layers that are kept.
        source_bytes: bytes of the checkpoint that are read at least once.
        notes: what the user should know.
        n_threads: threads that will work.
    """

    outtype: str
    output: OutputPlan
    recipes: tuple[Recipe, ...]
    n_nextn: int
    source_bytes: int
    notes: tuple[str, ...]
    n_threads: int

    def make(self, piece: Piece) -> Any:
        """The bytes of one piece."""
        return make(self.recipes[piece.tensor], piece)


def plan_conversion(
    path: str | Path, out: str | Path, options: ConvertOptions | None = None
) -> ConversionPlan:
    """Check a checkpoint and lay out the file it becomes. Nothing is written.

    Raises:
        ModelError: one message with everything that is missing, damaged, unexpected or of another
            architecture.
        UsageError: an option means nothing.
    """
    options = options or ConvertOptions()
    if options.outtype != _AUTO:
        mix_named(options.outtype)
    if options.max_shard_bytes is not None and options.max_shard_bytes <= 0:
        raise UsageError(f"split size: found {options.max_shard_bytes}; accepted: above 0")
    checkpoint = open_checkpoint(path)
    problems: list[str] = []
    config = read_config(checkpoint.config, problems)
    if config is None:
        raise_all(checkpoint.path, problems)
        raise AssertionError("a missing configuration is a problem")
    return _Planner(checkpoint, config, options, problems).plan(Path(out))


def convert(
    path: str | Path,
    out: str | Path,
    options: ConvertOptions | None = None,
    *,
    on_progress: Progress | None = None,
) -> ConversionPlan:
    """Convert a checkpoint. After an interruption the same call goes on where it stopped.

    Args:
        path: directory with ``config.json``, tokenizer files and safetensors.
        out: GGUF file; of several shards, ``name.gguf`` becomes ``name-00001-of-0000N.gguf``.
        options: what to make of it.
        on_progress: called with ``"write"``, the bytes done and the bytes in total.

    Raises:
        ModelError, UsageError: as plan_conversion, or numbers that the type cannot hold.
        OSError: a disk is full (found before writing), or a file cannot be read or written.
    """
    plan = plan_conversion(path, out, options)
    write_output(plan.output, plan.make, plan.n_threads, on_progress)
    return plan


class _Planner:
    """One checkpoint's tensors matched with those of the file; problems are gathered."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: HfConfig,
        options: ConvertOptions,
        problems: list[str],
    ) -> None:
        self._checkpoint = checkpoint
        self._config = config
        self._options = options
        self._problems = problems
        self._notes: list[str] = []
        self._used: set[str] = set()

    def plan(self, out: Path) -> ConversionPlan:
        checkpoint, config, options = self._checkpoint, self._config, self._options
        # Wrong extents would make thousands of wrong shapes of one wrong number.
        raise_all(checkpoint.path, self._problems)
        n_nextn = self._count_nextn()
        targets = declare(config, options.layout, n_nextn)
        found = {target.name: sources for target in targets if (sources := self._sources(target))}
        targets = [target for target in targets if target.name in found]
        self._refuse_unknown(n_nextn)
        outtype = options.outtype.lower()
        mix = mix_named(self._auto() if outtype == _AUTO else outtype)
        tokens = read_tokenizer(
            checkpoint.path, checkpoint.config, config.n_vocab, options.pre, self._problems
        )
        raise_all(checkpoint.path, self._problems)
        recipes = [
            Recipe(new, found[target.name], target.transform, config.d_nope)
            for target, new in zip(targets, self._formats(targets, mix, n_nextn), strict=True)
        ]
        keys = metadata(
            checkpoint.path,
            checkpoint.config,
            config,
            targets,
            mix,
            options.layout,
            n_nextn,
            options.name,
        )
        pieces = [piece for i, recipe in enumerate(recipes) for piece in cut(recipe, i)]
        output = plan_output(
            out,
            keys | tokens,
            [recipe.target for recipe in recipes],
            pieces,
            identity_of(checkpoint.files),
            options.max_shard_bytes,
        )
        return ConversionPlan(
            outtype=self._auto() if outtype == _AUTO else outtype,
            output=output,
            recipes=tuple(recipes),
            n_nextn=n_nextn,
            source_bytes=sum(checkpoint.tensors[name].n_bytes for name in self._used),
            notes=tuple(self._notes),
            n_threads=options.threads or _core.usable_physical_cores(),
        )

    def _count_nextn(self) -> int:
        """Prediction layers to keep: all that the configuration promises, or none."""
        config, names = self._config, set(self._checkpoint.tensors)
        if not config.n_layer_nextn:
            if has_layer(config, names, config.n_layer):
                self._notes.append(
                    f"layers from {config.n_layer} on are left out: config.json states no "
                    "num_nextn_predict_layers"
                )
            return 0
        if not has_layer(config, names, config.n_layer):
            self._notes.append("the checkpoint lacks its prediction layer (MTP): none is written")
            return 0
        if not self._options.keep_nextn:
            self._notes.append("the prediction layer (MTP) is left out")
            return 0
        return config.n_layer_nextn

    def _sources(self, target: Target) -> tuple[Source, ...]:
        """Where a tensor comes from; empty, with the problem reported, where something is wrong."""
        sources = [self._source(name, target) for name in target.sources]
        return tuple(source for source in sources if source) if all(sources) else ()

    def _source(self, name: str, target: Target) -> Source | None:
        tensor = self._checkpoint.tensors.get(name)
        if tensor is None or tensor.shape != target.source_shape:
            # The scales of a weight that is missing or wrong are known all the same.
            self._used |= {name, name + _SCALE_SUFFIX} & self._checkpoint.tensors.keys()
        if tensor is None:
            if target.required:
                self._problems.append(f"{name} {list(target.source_shape)}: missing")
            return None
        self._used.add(name)
        if tensor.shape != target.source_shape:
            wanted = list(target.source_shape)
            self._problems.append(f"{name}: found shape {list(tensor.shape)}; accepted: {wanted}")
            return None
        if tensor.dtype == FP8_DTYPE:
            return self._fp8_source(tensor)
        if tensor.dtype not in FLOAT_DTYPES:
            accepted = ", ".join((*FLOAT_DTYPES, FP8_DTYPE))
            self._problems.append(f"{name}: found {tensor.dtype}; accepted: {accepted}")
            return None
        return Source(tensor)

    def _fp8_source(self, tensor: StoredTensor) -> Source | None:
        name = tensor.name + _SCALE_SUFFIX
        scales = self._checkpoint.tensors.get(name)
        block = self._config.fp8_block
        if scales is None:
            self._problems.append(f"{name}: missing; fp8 weights mean nothing without their scales")
            return None
        self._used.add(name)
        accepted = scale_shape(tensor.shape, block) if len(tensor.shape) == 2 else ()
        if scales.shape != accepted or scales.dtype not in SCALE_DTYPES:
            self._problems.append(
                f"{name}: found {scales.dtype} {list(scales.shape)}; accepted: F32 {list(accepted)}"
            )
            return None
        return Source(tensor, scales, block)

    def _refuse_unknown(self, n_nextn: int) -> None:
        """What nobody here understands may change the computation."""
        others = self._checkpoint.tensors.keys() - self._used
        left_out = {name for name in others if is_left_out(self._config, name, n_nextn)}
        unknown = sorted(others - left_out)
        if unknown:
            self._problems.append(
                f"tensors not known ({len(unknown)}), which may change the computation: "
                f"{listed(folded(unknown))}"
            )
        foreign = [name for name in left_out if not name.startswith(self._config.prefix)]
        if foreign:
            self._notes.append(f"{len(foreign)} tensors of other modalities are left out")

    def _auto(self) -> str:
        """f16 for a checkpoint of mostly f16 numbers, bf16 for all others."""
        count: Counter[str] = Counter()
        for name in self._used:
            tensor = self._checkpoint.tensors[name]
            count[tensor.dtype] += tensor.n_bytes
        return "f16" if count.most_common(1)[0][0] == "F16" else "bf16"

    def _formats(self, targets: list[Target], mix: Mix, n_nextn: int) -> list[NewTensor]:
        config = self._config
        facts = MixFacts(
            n_layer=config.n_layer + n_nextn,
            n_expert=config.moe.n_expert if config.moe else 0,
            n_head=config.n_head,
            n_head_kv=config.n_head if self._options.layout == "legacy" else 1,
            tied=config.tied_embeddings,
        )
        tensors = [
            NewTensor(t.name, tensor_format(mix, t.name, t.shape, facts), t.shape) for t in targets
        ]
        fallen = [
            t for t in tensors if t.format == "F16" and mix.base not in ("F16", "F32", "BF16")
        ]
        if fallen:
            self._notes.append(
                f"{len(fallen)} tensors are written as F16, their rows being no multiple of 32: "
                f"{listed([tensor.name for tensor in fallen])}"
            )
        if mix.needs_importance:
            self._notes.append(f"{self._options.outtype} without importance gives poor models")
        return tensors


def estimate_seconds(plan: ConversionPlan) -> float:
    """How long a conversion takes here, from making one small part of each kind of tensor."""
    return estimate(plan.recipes, plan.output.pieces, plan.n_threads)
