"""Typed access to the metadata keys of the architecture, and what to do with all the others.

Every key is either read by ``config``, known to change nothing, or refused by name: a key that
nobody here understands may change the computation, and wrong text is worse than none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, TypeVar

import numpy as np

from .gguf import Value

ARCHITECTURE: Final = "deepseek2"
_MAX_EXTENT = (1 << 31) - 1

# Keys that are not read. A trailing dot or underscore makes a prefix. The numbers are values, in
# addition to 0, false and empty, at which a key changes nothing; None: no value ever does.
_UNREAD_KEYS: Final[tuple[tuple[str, tuple[float, ...] | None, str], ...]] = (
    ("rope.scaling.finetuned", None, ""),
    ("attention.layer_norm_epsilon", None, ""),
    ("decoder_start_token_id", None, ""),
    ("pooling_type", None, ""),
    ("attention.temperature_", (), "attention temperature that depends on the position"),
    ("attention.indexer.", (), "sparse attention through an indexer"),
    ("attention.sliding_window", (), "sliding-window attention"),
    ("attention.clamp_kqv", (), "clamped queries, keys and values"),
    ("attention.max_alibi_bias", (), "ALiBi"),
    ("attention.scale", (), "an attention scale other than the architecture's"),
    ("attention.output_scale", (1,), "scaled attention output"),
    ("attention.value_scale", (1,), "scaled values"),
    ("attn_logit_softcapping", (), "capped attention logits"),
    ("router_logit_softcapping", (), "capped router logits"),
    ("final_logit_softcapping", (), "capped logits"),
    ("logit_scale", (1,), "scaled logits"),
    ("residual_scale", (1,), "a scaled residual stream"),
    ("embedding_scale", (1,), "scaled embeddings"),
    ("swiglu_clamp_", (), "clamped SwiGLU"),
    ("moe_every_n_layers", (1,), "experts in only some layers"),
    ("interleave_moe_layer_step", (1,), "experts in only some layers"),
    ("expert_group_scale", (1,), "scaled expert groups"),
    ("moe_latent_size", (), "experts in a latent space"),
    ("hyper_connection.", (), "hyper-connections"),
    ("rope.scale_linear", (1,), "a scale from before rope.scaling.factor"),
    ("rope.scaling.alpha", (), "NTK-alpha scaling"),
    ("rope.scaling.yarn_ext_factor", (-1, 1), "a partial YaRN mix"),
    ("rope.scaling.yarn_attn_factor", (1,), "a second YaRN magnitude"),
    ("rope.dimension_sections", (), "multi-axis rotary positions"),
    ("", (), "a key that is not known here and may change the computation"),
)

_T = TypeVar("_T")


class Keys:
    """Typed access to one architecture's keys; gathers problems instead of raising them."""

    def __init__(self, metadata: Mapping[str, Value]) -> None:
        self.problems: list[str] = []
        self._metadata = metadata
        self._read: set[str] = set()

    def integer(
        self, name: str, default: int | None = None, low: int = 1, high: int = _MAX_EXTENT
    ) -> int:
        """An integer from ``low`` to ``high``; without ``default`` the key is required."""
        value = self._get(name, low if default is None else default, default is None)
        if type(value) is int and (low <= value <= high or value == default):
            return value
        return self._wrong(name, value, f"an integer from {low} to {high}", low)

    def number(
        self, name: str, default: float | None = None, low: float = 0.0, high: float = 1e12
    ) -> float:
        """A number above ``low`` and up to ``high``; without ``default`` the key is required."""
        value = self._get(name, high if default is None else default, default is None)
        if type(value) in (int, float) and (low < value <= high or value == default):  # type: ignore[operator]
            return float(value)  # type: ignore[arg-type]
        return self._wrong(name, value, f"a number above {low:g}, at most {high:g}", high)

    def flag(self, name: str, default: bool) -> bool:
        """A boolean."""
        value = self._get(name, default, False)
        return value if type(value) is bool else self._wrong(name, value, "true or false", default)

    def text(self, name: str, default: str) -> str:
        """A string."""
        value = self._get(name, default, False)
        return value if type(value) is str else self._wrong(name, value, "a string", default)

    def has(self, name: str) -> bool:
        """Whether the key is there with another value than 0, false or an empty one."""
        return not _is_neutral(self._metadata.get(f"{ARCHITECTURE}.{name}"), ())

    def ignore(self, *names: str) -> None:
        """Count keys as read whose values mean nothing in this file."""
        self._read.update(names)

    def require(self, condition: bool, problem: str) -> None:
        """Report ``problem`` unless ``condition`` holds."""
        if not condition:
            self.problems.append(problem)

    def refuse_others(self) -> None:
        """Report each key of the architecture that was not read and is not harmless."""
        prefix = f"{ARCHITECTURE}."
        for key, value in self._metadata.items():
            name = key.removeprefix(prefix)
            if not key.startswith(prefix) or name in self._read:
                continue
            neutral, reason = next(
                (neutral, reason)
                for entry, neutral, reason in _UNREAD_KEYS
                if name == entry or (entry[-1:] in ("", ".", "_") and name.startswith(entry))
            )
            if neutral is not None and not _is_neutral(value, neutral):
                self.problems.append(f"{key} = {_shown(value)}: not implemented: {reason}")

    def _get(self, name: str, default: _T, required: bool) -> Value | _T:
        self._read.add(name)
        value = self._metadata.get(f"{ARCHITECTURE}.{name}")
        if value is None:
            if required:
                self.problems.append(f"{ARCHITECTURE}.{name}: missing")
            return default
        if isinstance(value, np.ndarray) and value.size and bool((value == value[0]).all()):
            return value[0].item()  # type: ignore[no-any-return]  # one value per layer, all equal
        return value

    def _wrong(self, name: str, value: object, accepted: str, fallback: _T) -> _T:
        self.problems.append(f"{ARCHITECTURE}.{name}: found {_shown(value)}; accepted: {accepted}")
        return fallback


def _is_neutral(value: Value | None, neutral: tuple[float, ...]) -> bool:
    if isinstance(value, np.ndarray):
        return bool(np.isin(value, (0, *neutral)).all())
    return value is None or not value or (not isinstance(value, bool) and value in neutral)


def _shown(value: object) -> str:
    text = repr(value.tolist()) if isinstance(value, np.ndarray) and value.size < 9 else repr(value)
    return text if len(text) < 80 else text[:76] + " ..."
