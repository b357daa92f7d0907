"""Units of scores and of their differences, which the last word of a metric's name tells: `psnr_db` is in dB."""

from __future__ import annotations

_UNITS = {"db": ("dB", "dB"), "percent": ("%", "pp")}  # of a score, and of a difference: pp are percentage points


def unit_of_score(metric: str) -> str:
    """`dB`, `%`, or nothing for a metric without a unit."""
    return _UNITS.get(metric.rpartition("_")[2], ("", ""))[0]


def unit_of_difference(metric: str) -> str:
    """`dB`, `pp` (percentage points), or nothing for a metric without a unit."""
    return _UNITS.get(metric.rpartition("_")[2], ("", ""))[1]
