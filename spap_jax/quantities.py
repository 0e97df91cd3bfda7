"""Formats amounts for users, the same on a terminal and on a page."""

import math
from collections.abc import Collection


def bytes_text(count: float) -> str:
    """1 234 567 890 -> "1.23 GB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:  # which rounds to three digits
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def peak_text(process: int | None, device: int | None) -> str:
    """The peak memory of a run: that of its process, and that of a device which has memory of its own."""
    return bytes_text(process or 0) + (f", of a device {bytes_text(device)}" if device else "")


def count_text(count: int) -> str:
    """1234567 -> "1 234 567"."""
    return f"{count:,}".replace(",", " ")


def range_text(counts: Collection[int]) -> str:
    """(224, 320, 256) -> "224 to 320"; one number if all are the same."""
    least, most = min(counts), max(counts)
    return f"{most}" if least == most else f"{least} to {most}"


def change_text(before: float, after: float) -> str:
    """The relative change, in per cent; a dash if there is none."""
    return f"{100 * (after / before - 1):+.1f} %" if before and math.isfinite(after) else "-"


def loss_text(value: float) -> str:
    """Formats a perplexity or a loss."""
    return f"{value:.4f}" if math.isfinite(value) else "not finite"


def duration_text(seconds: float, digits: int = 3) -> str:
    """5400 -> "1.5 h"; with the given number of significant digits."""
    units = (("s", 1, 120), ("min", 60, 120), ("h", 3600, 48), ("days", 86400, math.inf))
    unit, size = next((unit, size) for unit, size, most in units if seconds < size * most)
    return f"{float(f'{seconds / size:.{digits}g}'):g} {unit}"


def percent_text(fraction: float) -> str:
    """0.3 -> "30 %", 0.0593 -> "5.9 %"; values below one per cent keep two significant digits."""
    percent = 100 * fraction
    return (f"{percent:.1f}".removesuffix(".0") if percent >= 1 else f"{percent:.2g}") + " %"
