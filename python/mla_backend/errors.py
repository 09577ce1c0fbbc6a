"""Every exception the package raises on purpose.

Each class derives from :class:`MlaError` and from the built-in exception that a caller who knows
nothing of this package would catch. C++ throws the first four; the bindings translate them.
"""

from __future__ import annotations


class MlaError(Exception):
    """Base of all errors raised on purpose by mla_backend."""


class ShapeError(MlaError, ValueError):
    """Operand shapes, strides or extents do not fit the operation."""


class UnsupportedError(MlaError, NotImplementedError):
    """No backend has the operation for these dtypes, or an ISA is not available here."""


class FormatError(MlaError, ValueError):
    """A weight format or dtype is unknown or does not fit the data."""


class DeviceError(MlaError, RuntimeError):
    """The operating system or a device failed while computing (lost mapping, thread, memory)."""


class ModelError(MlaError, ValueError):
    """A model file is damaged, incomplete, of another architecture, or needs what is not here."""


class ContextError(MlaError, ValueError):
    """A prompt or a session does not fit into the context."""


class MemoryLimitError(MlaError, MemoryError):
    """The memory asked for exceeds what this machine or its cgroup can give."""


class CancelledError(MlaError, RuntimeError):
    """A computation was stopped by its cancel token; what was finished is kept."""


class TokenizerError(MlaError, ValueError):
    """The file's tokenizer cannot be built or the text cannot be encoded."""


class TemplateError(MlaError, ValueError):
    """The chat template is invalid or refused the conversation."""


class SessionError(MlaError, ValueError):
    """A saved session is damaged or belongs to another model."""


class UsageError(MlaError, ValueError):
    """An option or argument has no meaning here; the message says what is accepted."""
