"""Print the units that users meet: bytes (binary prefixes), counts and seconds."""

from __future__ import annotations

_PREFIXES = ("B", "KiB", "MiB", "GiB", "TiB")


def format_bytes(count: float) -> str:
    """``48.40 GiB`` for 51,969,556,480. Whole bytes below 1 KiB."""
    for prefix in _PREFIXES[:-1]:
        if abs(count) < 1024:
            return f"{count:.0f} B" if prefix == "B" else f"{count:.2f} {prefix}"
        count /= 1024
    return f"{count:.2f} {_PREFIXES[-1]}"


def format_seconds(seconds: float) -> str:
    """``850 ms``, ``12.3 s``, ``4 min 05 s`` or ``2 h 10 min``."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def format_count(count: int) -> str:
    """``49,867,145,216``."""
    return f"{count:,}"
