"""Amounts in words for people, the same on a terminal and on a page."""

from collections.abc import Collection


def bytes_text(count: float) -> str:
    """1 234 567 890 -> "1.23 GB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def count_text(count: int) -> str:
    """1234567 -> "1 234 567"."""
    return f"{count:,}".replace(",", " ")


def range_text(counts: Collection[int]) -> str:
    """(224, 320, 256) -> "224 to 320"; one number if all are the same."""
    least, most = min(counts), max(counts)
    return f"{most}" if least == most else f"{least} to {most}"


def change_text(before: float, after: float) -> str:
    """How much smaller or larger, in per cent; a dash where it was nothing."""
    if before == 0:
        return "-"
    return f"{100 * (after / before - 1):+.1f} %"


def signed(text: str) -> str:
    """With a minus sign in place of the hyphen that terminals and files have."""
    return text.replace("-", "\N{MINUS SIGN}")


def duration_text(seconds: float) -> str:
    """5400 -> "1.5 h"."""
    for unit, size, most in (("s", 1, 120), ("min", 60, 120), ("h", 3600, 48)):
        if seconds < size * most:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 86400:.3g} days"
