"""Numbers as people read them: seconds, bytes and rates with a unit and three significant digits.

Decimal units throughout (1 GB = 10^9 bytes), as disks and links are sold. Pure, safe from any thread.
"""

from __future__ import annotations

_TIME = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns"))
_BYTES = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def _significant(value: float) -> str:
    """Three significant digits without an exponent: 0.123, 1.23, 12.3, 123, 1 234."""
    magnitude = abs(value)
    if magnitude >= 999.5:
        return f"{value:,.0f}".replace(",", "\u202f")
    digits = 0 if magnitude >= 99.95 else 1 if magnitude >= 9.995 else 2 if magnitude >= 0.9995 else 3
    return f"{value:.{digits}f}"


def seconds_text(seconds: float) -> str:
    """1.23 s, 45.6 ms, 7.89 µs; "0 s" for zero."""
    if seconds == 0:
        return "0 s"
    for scale, unit in _TIME:
        if abs(seconds) >= 0.9995 * scale:
            return f"{_significant(seconds / scale)} {unit}"
    return "< 1 ns"


def nbytes_text(nbytes: float) -> str:
    """1.23 GB, 45.6 MB, 789 B."""
    for scale, unit in _BYTES:
        if abs(nbytes) >= 0.9995 * scale:
            return f"{_significant(nbytes / scale)} {unit}"
    return f"{nbytes:.0f} B"


def rate_text(bytes_per_second: float) -> str:
    """1.23 GB/s."""
    return f"{nbytes_text(bytes_per_second)}/s"


def share_text(fraction: float) -> str:
    """12.3 %, < 0.1 % for what is there but small, 0 % for nothing."""
    if fraction == 0:
        return "0 %"
    if 0 < fraction < 0.001:
        return "< 0.1 %"
    return f"{100 * fraction:.1f} %"
