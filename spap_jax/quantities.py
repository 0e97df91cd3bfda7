"""Amounts in words for people, the same on a terminal and on a page."""


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


def share_text(fraction: float) -> str:
    """0.0625 -> "6.25%"."""
    return f"{100 * fraction:.3g}%"


def missed(achieved: float, asked: float) -> bool:
    """Whether a fraction is so far from the one asked for that both have to be told: by a hundredth of the whole."""
    return abs(achieved - asked) >= 0.01


def achieved_text(achieved: float, asked: float, whole: str) -> str:
    """0.0625, 0.3, "the channels" -> "6.25% of the channels (30% asked for)"; without brackets if they are close."""
    words = f"{share_text(achieved)} of {whole}"
    return f"{words} ({share_text(asked)} asked for)" if missed(achieved, asked) else words
