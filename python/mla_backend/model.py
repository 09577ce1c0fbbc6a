"""Model: a GGUF file ready to generate."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import fields, replace
from functools import partial
from operator import index
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

from mla_backend import _core
from mla_backend.attention_mode import MODES, AttentionMode
from mla_backend.cache import CACHE_TYPES, LatentCache, cache_bytes
from mla_backend.chat import ChatTemplate, encode_chat
from mla_backend.config import ModelConfig, config_from_gguf
from mla_backend.devices import Devices, check_name, open_gpus
from mla_backend.errors import UsageError
from mla_backend.generator import (
    Chunk,
    Completion,
    GenerationOptions,
    check_prompt,
    complete,
    stream,
)
from mla_backend.gguf import GGUFFile, TensorInfo, read_gguf
from mla_backend.loading import LoadOptions, PartLoad, Weights, load_weights, upload_weights
from mla_backend.locks import CallLock
from mla_backend.memory import MemoryReport, check_memory, report_memory
from mla_backend.models.inputs import Observer
from mla_backend.node_loading import load_on_nodes
from mla_backend.numa import NumaMode, NumaPlan, plan_numa
from mla_backend.placement import CPU, Placement, PlacementOptions
from mla_backend.planning import LoadPlan
from mla_backend.residency import PlacementReport, placement_notes, placement_report
from mla_backend.runner import Engine, Logits, Runner
from mla_backend.sampling import SamplingParams
from mla_backend.session import Session
from mla_backend.threads import Defaults, choose_defaults
from mla_backend.tokenizer import Tokenizer
from mla_backend.traffic import ReadTraffic, counting
from mla_backend.weights import check as check_weights

if TYPE_CHECKING:
    from mla_backend.benchmark import BenchResult

Progress = Callable[[str, int, int], None]
Message = Mapping[str, Any]
Prompt = str | Sequence[int]
Chunks = Generator[Chunk, None, None]

PRECISIONS: Final = ("fast", "exact")
#: Logits of all positions are computed in chunks whose rows stay below this.
_LOGITS_BYTES: Final = 256 << 20
#: Positions and cells are 32-bit integers.
_MAX_POSITIONS: Final = (1 << 31) - 64
#: The most threads a pool takes.
_MAX_THREADS: Final = 4096
_BUSY: Final = (
    "a stream of this model is still open in this thread: finish it, close it, "
    "or use model.session() for a second one"
)
_SAMPLING_FIELDS: Final = frozenset(field.name for field in fields(SamplingParams))


class Model:
    """One model in memory.

    Calls from several threads are serialized; sessions made with ``session`` are independent.

    Attributes:
        config: what the file's metadata says.
        file: the file's header.
        tokenizer, template: built from the metadata; text in, token ids out.
        n_ctx: positions of the model's own context.
        notes: one-line statements about how it was loaded, meant for the user.
    """

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        n_ctx: int | None = None,
        threads: int | None = None,
        attention: AttentionMode = "auto",
        cache_type: str = "f16",
        precision: str = "fast",
        device: str = "auto",
        kv_file: str | Path | None = None,
        mmap: bool = True,
        mlock: bool = False,
        isa: str | None = None,
        numa: NumaMode = "auto",
        numa_nodes: str | None = None,
        n_batch: int | None = None,
        gpu_layers: int | None = None,
        cpu_moe: bool = False,
        override_tensor: Sequence[tuple[str, str]] = (),
        tensor_split: Sequence[float] | None = None,
        tuned: bool = True,
        on_progress: Progress | None = None,
    ) -> Model:
        """Open a GGUF file; any shard of a split one may be named.

        Args:
            n_ctx: positions of the context; None is the trained length or what memory allows.
            threads: None is what ``mla-backend tune`` found, or one per physical core that this
                process may use.
            attention: "absorbed", "expanded", or "auto": the cheaper one for each chunk.
            cache_type: f32, f16, bf16 or q8_0.
            precision: "fast" rounds activations as the kernels like; "exact" keeps float32.
            device: "cpu"; "cuda" (all GPUs) or "cuda:1"; "auto": GPUs where there are any.
            kv_file: a new file to hold the cache, for contexts larger than memory; it goes when
                the model does.
            mmap: map the weights (files on network file systems are read all the same).
            mlock: keep mapped weights in memory; DeviceError where the system refuses.
            isa: CPU instruction set; None is MLA_CPU_ISA or the best this CPU has.
            numa: where weights lie on a machine with several memory nodes, see ``plan_numa``:
                "shard" splits each over the nodes, which read it there; "interleave", "off"; "auto"
                is "shard" with several groups of nodes and memory for the weights.
            numa_nodes: the nodes to use, as in "0-3,8"; None: those this process may use.
            n_batch: tokens of a prompt computed at a time; None: up to 4096, as memory allows.
            gpu_layers, cpu_moe, override_tensor, tensor_split: what goes where, see
                PlacementOptions; unset: as many layers as fit on the GPUs, experts last.
            tuned: use what was found out about this machine before, see ``TunedFile``.
            on_progress: called as (phase, done, total), in bytes: "load"; before it "load node 0"
                ("load nodes 0-3") where several groups of nodes load side by side; "upload", for
                devices.

        Raises:
            ModelError: the file is damaged, incomplete, or no model this engine runs.
            MemoryLimitError: cache, workspace and copies exceed the memory available.
            UnsupportedError: the CPU lacks the ISA. UsageError: an argument has no such value.
            DeviceError: the device that was named cannot be used.
            TokenizerError, TemplateError: the metadata contradicts itself. A tokenizer that is
                merely unknown here is a note: token ids still work.
        """
        _check_choice("attention", attention, MODES)
        _check_choice("precision", precision, PRECISIONS)
        _check_choice("cache_type", cache_type, CACHE_TYPES)
        check_name(device)
        _check_count("n_ctx", n_ctx, _MAX_POSITIONS)
        _check_count("threads", threads, _MAX_THREADS)
        _check_count("n_batch", n_batch, _MAX_POSITIONS)
        file = read_gguf(path)
        config = config_from_gguf(file)
        infos = check_weights(config, file)
        nodes = plan_numa(numa, numa_nodes)
        gpus, idle = open_gpus(device)
        wishes = PlacementOptions(gpu_layers, cpu_moe, override_tensor, tensor_split)
        plan = LoadPlan(
            file,
            config,
            infos,
            cache_type,
            n_ctx,
            kv_file,
            LoadOptions(mmap=mmap, mlock=mlock, threads=threads or 4),
            gpus=gpus,
            wishes=wishes,
            n_batch=n_batch,
            numa=nodes,
            must_place=numa != "auto",
            choose_defaults=partial(choose_defaults, config, infos, threads=threads, tuned=tuned),
        )
        plan.notes += [idle] if idle else []
        devices = Devices(plan.make_backend(isa, precision), gpus)
        weights = _load(plan, on_progress)
        engine = _make_engine(plan, weights, devices, precision, attention, on_progress)
        model = cls(plan, engine, devices)
        if plan.weights_fit and not plan.placement.uses_devices:
            weights.prefetch(on_progress)
        return model

    def __init__(self, plan: LoadPlan, engine: Engine, devices: Devices) -> None:
        """Use ``load``."""
        self.config: ModelConfig = plan.config
        self.file: GGUFFile = plan.file
        self.tokenizer = Tokenizer.from_metadata(plan.file.metadata)
        self.template = ChatTemplate.from_metadata(
            plan.file.metadata,
            bos_token=self.tokenizer.bos_token,
            eos_token=self.tokenizer.eos_token,
        )
        self.n_ctx = plan.n_ctx
        self.notes: list[str] = plan.notes
        if self.tokenizer.problem is not None:
            self.notes.append(self.tokenizer.problem)
        self._cache_type = plan.cache_type
        self._kv_file = plan.kv_file
        self._engine = engine
        self._devices = devices
        self._backend = devices.cpu
        self._placement = plan.placement
        self._numa = plan.numa
        #: Why it has these threads, and whether tuned settings are used.
        self.defaults: Defaults = plan.defaults
        self._host_share = plan.host_share
        self._n_batch = plan.n_batch
        self._fingerprint = _fingerprint(plan.file, plan.infos, engine.weights)
        self._calls = CallLock(_BUSY)
        cache = self._new_cache(self.n_ctx, plan.kv_file)
        refused = (f"numa: {refusal}" for refusal in cache.memory.refusals)
        self.notes += [note for note in refused if note not in self.notes]
        runner = Runner(engine, cache)
        runner.prepare(self._n_batch)
        runner.prepare(1)
        if refusals := runner.refusals():
            self.notes.append(
                f"{len(refusals)} operations run on the CPU instead; the first: {refusals[0]}"
            )
        self._check_memory(self.memory.cache_bytes, cache_in_file=plan.kv_file is not None)
        self._runner, self._cache = runner, cache
        self._session = self._new_session(runner, cache)

    @property
    def memory(self) -> MemoryReport:
        """Bytes of weights, of the model's own cache, and of the workspace."""
        return report_memory(
            self.config,
            self._cache_type,
            self.n_ctx,
            mapped_bytes=self._engine.weights.mapped_bytes,
            copied_bytes=self._engine.weights.copied_bytes,
            workspace_bytes=self._engine.workspace.n_host_bytes,
            host_share=self._host_share,
            device_bytes=self._device_bytes,
        )

    @property
    def _device_bytes(self) -> int:
        engine = self._engine
        cache = cache_bytes(self.config, self._cache_type, self.n_ctx)
        workspace = engine.workspace.n_bytes - engine.workspace.n_host_bytes
        uploads = sum(upload.n_bytes for upload in engine.uploads)
        return uploads + workspace + round(cache * (1.0 - self._host_share))

    @property
    def placement(self) -> Placement:
        """What lies on which device."""
        return self._placement

    @property
    def numa(self) -> NumaPlan:
        """Which nodes keep what of the weights."""
        return self._numa

    @property
    def loaded(self) -> tuple[PartLoad, ...]:
        """How fast each group of nodes read its weights; empty where they are mapped."""
        return self._engine.weights.loaded

    def placement_report(self, *, repair: bool = True) -> PlacementReport:
        """Ask the kernel on which nodes weights and cache lie.

        Pages that strayed are moved back, unless ``repair`` is False. Raises DeviceError where the
        kernel does not tell.
        """
        parts = (*self._engine.weights.parts, *self._cache.memory.parts)
        return placement_report(parts, repair=repair)

    def counting_reads(self) -> AbstractContextManager[ReadTraffic]:
        """Count the weight bytes that threads read within, by NUMA node; for diagnosis, it is slow.

        No other thread may use the model meanwhile. Raises DeviceError where the kernel does not
        tell the nodes of pages.
        """
        return counting(self._backend, [group.nodes for group in self._numa.groups])

    @property
    def isa(self) -> str:
        """The CPU instruction set in use."""
        return self._backend.isa

    @property
    def n_threads(self) -> int:
        """Threads computing, the caller's included."""
        return self._backend.n_threads

    @property
    def attention_isa(self) -> str:
        """What attention is computed with: the CPU's instruction set, or "cuda"."""
        return self._engine.isa

    @property
    def cache_type(self) -> str:
        """Type of the cached numbers."""
        return self._cache_type

    @property
    def n_batch(self) -> int:
        """Tokens of a prompt computed at a time."""
        return self._n_batch

    # ---- text -----------------------------------------------------------------------------------

    def generate(self, prompt: Prompt, **options: Any) -> Completion:
        """Continue a prompt.

        Args:
            prompt: text (BOS is added where the file says so) or token ids, taken as they are.
            session: continue in this session instead of the model's own context. The prompt is the
                whole text all the same: what of it the session holds is not computed again.
            options: fields of GenerationOptions (max_tokens, logits_processors, cancel,
                on_progress, sampling) and of SamplingParams (temperature, top_k, seed, stop,
                logprobs, ...), which override those of ``sampling``.

        Raises:
            ContextError: the prompt is longer than the context; nothing was computed.
            UsageError: an empty prompt, or an option out of range.
        """
        return complete(self.stream(prompt, **options))

    def stream(self, prompt: Prompt, **options: Any) -> Chunks:
        """Like ``generate``, chunk by chunk. The model is busy until the stream ends or is closed.

        A prefix that the last call computed is not computed again. Errors of ``generate`` that
        need no computing are raised here and not with the first chunk.
        """
        if isinstance(prompt, str):
            ids = self.tokenizer.encode(prompt) if prompt else []  # BOS alone is no prompt
        else:
            ids = [index(i) for i in prompt]
        return self._stream(ids, options)

    def chat(self, messages: Sequence[Message], **options: Any) -> Completion:
        """Answer a conversation, laid out by the file's template.

        ``template_options`` (a mapping) reaches the template; all else is as in ``generate``.
        """
        return complete(self.stream_chat(messages, **options))

    def stream_chat(self, messages: Sequence[Message], **options: Any) -> Chunks:
        """Like ``chat``, chunk by chunk. Raises TemplateError where the template refuses."""
        if not messages:
            raise UsageError("the conversation is empty; give at least one message")
        extra = options.pop("template_options", {})
        ids = encode_chat(self.tokenizer, self.template.render(messages, **extra))
        return self._stream(ids, options)

    def _stream(self, ids: Sequence[int], options: dict[str, Any]) -> Chunks:
        session: Session | None = options.pop("session", None)
        parsed = _options(options)
        if session is not None:
            return stream(session, self.tokenizer, ids, parsed)
        check_prompt(ids, self.n_ctx)
        return self._stream_own(ids, parsed)

    def _stream_own(self, ids: Sequence[int], options: GenerationOptions) -> Chunks:
        with self._calls:
            yield from stream(self._session, self.tokenizer, ids, options)

    # ---- tokens ---------------------------------------------------------------------------------

    def logits(
        self,
        token_ids: Sequence[int],
        *,
        cancel: _core.CancelToken | None = None,
        on_progress: Progress | None = None,
    ) -> Logits:
        """Logits after every token, in a fresh context: float32 [T, vocab].

        Raises ContextError, ShapeError (no tokens, unknown ids), CancelledError.
        """
        ids = [index(i) for i in token_ids]
        n_batch = max(1, min(self._n_batch, _LOGITS_BYTES // (4 * self.config.n_vocab)))
        with self.own_session(n_batch=n_batch) as session:
            return session.feed(ids, outputs=len(ids), cancel=cancel, on_progress=on_progress)

    @contextmanager
    def own_session(self, *, n_batch: int | None = None) -> Iterator[Session]:
        """The model's own context as an empty session; what the last call left in it is forgotten.

        Takes no more memory, and the model is busy until the context ends. ``n_batch``: tokens
        computed at a time, unless as the model was loaded.
        """
        _check_count("n_batch", n_batch, _MAX_POSITIONS)
        with self._calls:
            self._session.truncate(0)
            session = self._new_session(self._runner, self._cache, n_batch)
            attention = session.attention
            try:
                yield session
            finally:
                session.close()
                self._runner.attention = attention

    def bench(
        self,
        n_prompt: int = 512,
        n_gen: int = 64,
        depth: int = 0,
        *,
        attention: AttentionMode | None = None,
        repeats: int = 3,
        on_progress: Progress | None = None,
    ) -> BenchResult:
        """Measure prefill and decode rates in the model's own context, which is empty afterwards.

        Args:
            n_prompt: tokens of prefill; 0: not measured.
            n_gen: tokens of decode, one by one; 0: not measured.
            depth: positions cached before.
            attention: "absorbed", "expanded" or "auto" for this once; None: as loaded.
            repeats: rates are medians of so many runs.
            on_progress: called as ("bench", runs done, runs in all).

        Raises UsageError for arguments out of range, ContextError where the context is too short.
        """
        from mla_backend.benchmark import bench

        return bench(
            self,
            n_prompt,
            n_gen,
            depth,
            attention=attention,
            repeats=repeats,
            on_progress=on_progress,
        )

    def session(self, n_ctx: int | None = None, *, observer: Observer | None = None) -> Session:
        """A session with a cache of its own, of the model's context length unless told otherwise.

        An observer is told of every product with weights as the session's graphs are built.
        Raises MemoryLimitError where another cache does not fit.
        """
        _check_count("n_ctx", n_ctx, _MAX_POSITIONS)
        n_ctx = self.n_ctx if n_ctx is None else n_ctx
        extra = round(cache_bytes(self.config, self._cache_type, n_ctx) * self._host_share)
        self._check_memory(extra, cache_in_file=False)
        cache = self._new_cache(n_ctx, None)
        return self._new_session(Runner(self._engine, cache, observer), cache)

    def save_session(self, path: str | Path) -> None:
        """Save what the last call left in the model's own context; see ``Session.save``."""
        with self._calls:
            self._session.save(path)

    def load_session(self, path: str | Path) -> None:
        """Restore it, so that a prompt that begins alike is not computed again.

        Raises SessionError or ContextError as ``Session.load`` does.
        """
        with self._calls:
            self._session.load(path)

    def _check_memory(self, cache_bytes: int, *, cache_in_file: bool) -> None:
        """Refuse a cache that does not fit; copied weights are in memory and counted already."""
        report = replace(self.memory, weights_copied_bytes=0, cache_bytes=cache_bytes)
        check_memory(report, cache_in_file=cache_in_file)

    def _new_cache(self, n_ctx: int, kv_file: Path | None) -> LatentCache:
        return LatentCache(
            self.config,
            n_ctx,
            self._cache_type,
            backend=self._backend,
            kv_file=kv_file,
            devices={
                layer: self._devices.by_name(name)
                for layer, name in enumerate(self._placement.layers)
                if name != CPU
            },
            shares=self._numa.memory,
        )

    def _new_session(
        self, runner: Runner, cache: LatentCache, n_batch: int | None = None
    ) -> Session:
        return Session(
            runner, cache, self._fingerprint, self.config.n_vocab, n_batch or self._n_batch
        )

    # ---- life -----------------------------------------------------------------------------------

    def close(self) -> None:
        """Let go of cache and weights; uses raise UsageError then. Sessions keep what they need."""
        if self.__dict__:
            with self._calls:
                self.__dict__.clear()

    def __getattr__(self, name: str) -> Any:
        if not self.__dict__:
            raise UsageError(f"model.{name}: the model is closed")
        raise AttributeError(f"a model has no attribute {name!r}")

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _load(plan: LoadPlan, on_progress: Progress | None) -> Weights:
    """Weights in memory, on their nodes where the plan has it so."""
    if not plan.placed_bytes:
        return load_weights(plan.file, plan.infos, plan.options, on_progress)
    weights = load_on_nodes(
        plan.file,
        plan.infos,
        plan.config,
        plan.numa,
        plan.placement,
        plan.options,
        on_progress,
    )
    plan.notes += weights.notes or placement_notes(weights.parts)
    return weights


def _make_engine(
    plan: LoadPlan,
    weights: Weights,
    devices: Devices,
    precision: str,
    attention: AttentionMode,
    on_progress: Progress | None,
) -> Engine:
    """The engine with all weights where they belong."""
    placement = plan.placement
    used = devices if placement.uses_devices else Devices(devices.cpu)
    workspace = _core.Workspace(used.backends)
    uploads = upload_weights(
        weights,
        list(plan.infos),
        workspace,
        lambda name: used.by_name(placement.of(name)),
        on_progress,
    )
    isa = "cuda" if placement.layers[-1] != CPU else devices.cpu.isa
    return Engine(plan.config, weights, workspace, precision, attention, isa, placement.of, uploads)


def _options(given: dict[str, Any]) -> GenerationOptions:
    """Split keyword options into those of the loop and those of the sampler."""
    sampling = given.pop("sampling", None) or SamplingParams()
    overrides = {name: given.pop(name) for name in list(given) if name in _SAMPLING_FIELDS}
    known = {field.name for field in fields(GenerationOptions)} - {"sampling"}
    unknown = sorted(set(given) - known)
    if unknown:
        accepted = ", ".join(sorted(known | _SAMPLING_FIELDS | {"sampling"}))
        raise UsageError(f"unknown option {', '.join(unknown)}; accepted are {accepted}")
    return GenerationOptions(sampling=replace(sampling, **overrides), **given)


def _check_count(name: str, value: int | None, most: int) -> None:
    if value is None:
        return
    if not hasattr(value, "__index__") or value < 1:
        raise UsageError(f"{name} {value!r}; accepted is 1 or more")
    if value > most:
        raise UsageError(f"{name} {value!r}; accepted is at most {most}")


def _check_choice(name: str, value: str, accepted: Sequence[str]) -> None:
    if value not in accepted:
        raise UsageError(f"{name} {value!r}; accepted are {', '.join(accepted)}")


def _fingerprint(file: GGUFFile, infos: Mapping[str, TensorInfo], weights: Weights) -> str:
    """Identifies the weights: names, shapes, formats, and a few bytes of every tensor."""
    digest = hashlib.blake2b(digest_size=16)
    for name, info in infos.items():
        digest.update(f"{name} {info.format} {info.shape};".encode())
        digest.update(weights.head(name))
    digest.update(str(file.metadata.get("general.architecture")).encode())
    return digest.hexdigest()
