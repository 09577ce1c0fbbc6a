"""Numbers for people: bytes, counts, times, rates."""

from __future__ import annotations

_BYTE_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB")
_COUNT_UNITS = ("", " thousand", " million", " billion", " trillion")


def bytes_text(n_bytes: float) -> str:
    """``10.4 GiB``."""
    value, unit = _scale(n_bytes, 1024, _BYTE_UNITS)
    return f"{value} {unit}"


def count_text(n: float) -> str:
    """``15.7 billion``."""
    value, unit = _scale(n, 1000, _COUNT_UNITS)
    return value + unit


def duration_text(seconds: float) -> str:
    """``8 s``, ``3 min 20 s``, ``2 h 5 min``."""
    whole = max(round(seconds), 0)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def rate_text(per_second: float, unit: str) -> str:
    """Amount per second: ``unit`` is ``bytes`` or a word such as ``tokens``."""
    if unit == "bytes":
        return f"{bytes_text(per_second)}/s"
    digits = 0 if per_second >= 100 else 1 if per_second >= 10 else 2
    return f"{per_second:.{digits}f} {unit}/s"


def _scale(n: float, base: int, units: tuple[str, ...]) -> tuple[str, str]:
    """Up to four digits, and the unit they are in."""
    power = 0
    while n >= base and power + 1 < len(units):
        n, power = n / base, power + 1
    digits = 0 if power == 0 or n >= 99.95 else 1
    return f"{n:.{digits}f}", units[power]
