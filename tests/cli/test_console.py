"""Console output of the commands: tables, names of others, and sizes in words."""

import io

import pytest

from spap_jax.cli import console
from spap_jax.errors import warn
from spap_jax.quantities import bytes_text, change_text, count_text, duration_text, peak_text, percent_text

PATHS = [f"/a/long/way/down/to/the/folder/of/the/checkpoint-{number}" for number in (1, 2)]
SPEED = (("", *PATHS, "ratio"), [("prefill, tokens/s", "15342.9", "11011.1", "0.718x")])
MEMORY = (
    ("phase", "weights", "streams", "largest moments", "together"),
    [("alternating", "2.61", "6.29", "", "14.7"), ("joint steps", "2.34", "6.29", "1 234 567", "41.1 MB")],
)


@pytest.mark.parametrize("columns", [30, 80])
@pytest.mark.parametrize(("heads", "rows"), [SPEED, MEMORY])
def test_no_word_of_a_table_is_broken_or_cut(
    heads: tuple[str, ...],
    rows: list[tuple[str, ...]],
    columns: int,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    """Numbers are not broken either; a line is longer than the terminal only if it has to be."""
    monkeypatch.setattr(console.out, "width", columns)
    console.table("title", heads, rows)
    printed = capsys.readouterr().out
    names = [*heads, *(row[0] for row in rows)]
    assert {word for name in names for word in name.split()} <= {*printed.split()}
    assert all(number in printed for row in rows for number in row[1:])
    assert max(map(len, printed.splitlines())) <= columns or columns == 30 or heads[1] in PATHS


@pytest.mark.parametrize("columns", [10, 80])
def test_a_table_without_rows(columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(console.out, "width", columns)
    console.table("title", ("task", "metric value"), [])
    assert capsys.readouterr().out.startswith("title\n")


class Screen(io.StringIO):
    """A terminal."""

    def isatty(self) -> bool:
        """As files do."""
        return True


@pytest.mark.parametrize(
    ("written", "term", "is_terminal"),
    [(Screen(), "xterm", True), (io.StringIO(), "xterm", False), (Screen(), "dumb", False)],
    ids=["terminal", "file", "no cursor"],
)
def test_bars_are_for_terminals(
    written: io.StringIO, term: str, is_terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", term)
    monkeypatch.setenv("FORCE_COLOR", "1")  # makes no file a terminal
    assert console.Stream(file=written).is_terminal == is_terminal


def test_names_that_others_chose_are_shown_as_they_are(capsys, monkeypatch: pytest.MonkeyPatch):
    """No markup, no password while a spinner turns, and no code that a terminal would obey in a warning."""
    with console.waiting("reading [red]model[/red] [/x] my/set:ok:0.5"):
        pass
    console.table("[b]title[/b]", ("", "[i]"), [("[/row]", "1")])
    with console.notices():
        warn("config.json names a\x1b[2J\nwrote out")
    said = capsys.readouterr()
    assert said.err.splitlines() == [
        "reading [red]model[/red] [/x] my/set:ok:0.5 ...",
        r"spap: warning: config.json names a\x1b[2J\nwrote out",
    ]
    assert {"[b]title[/b]", "[/row]"} <= set(said.out.split())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(console, "err", console.Stream(file=Screen(), width=80))
    with console.waiting("reading https://me:secret@host/x, https://token@host/y, abfs://part@store/z"):
        pass
    assert "reading https://host/x, https://host/y, abfs://part@store/z ..." in console.err.file.getvalue()  # type: ignore


def test_sizes_in_words():
    bounds = [bytes_text(n) for n in (0, 999, 999.6, 1.234e9, 5e15)]
    assert bounds == ["0 B", "999 B", "1 kB", "1.23 GB", "5e+03 TB"]
    assert count_text(1234567) == "1 234 567"
    assert [peak_text(2 * 10**9, device) for device in (None, 6 * 10**10)] == ["2 GB", "2 GB, of a device 60 GB"]
    assert change_text(4, 3) == "-25.0 %"
    assert [percent_text(part) for part in (1.2, 0.0593, 0.00123)] == ["120 %", "5.9 %", "0.12 %"]
    durations = [duration_text(seconds, digits=2) for seconds in (0.0912, 118, 2340, 5400, 400000)]
    assert durations == ["0.091 s", "120 s", "39 min", "90 min", "4.6 days"]
