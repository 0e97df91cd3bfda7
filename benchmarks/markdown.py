"""Tables in Markdown, for the pages of the benchmarks."""

from collections.abc import Collection, Iterable, Sequence


def table(head: Sequence[str], lines: Iterable[Sequence[str]], words: Collection[str] = ()) -> str:
    """Formats a table: the first column and those named in ``words`` hold text, aligned left, the others numbers."""
    rule = ["---" if name in (head[0], *words) else "---:" for name in head]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *lines))
