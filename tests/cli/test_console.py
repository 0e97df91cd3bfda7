"""Console output of the commands: tables, names and sizes, and progress."""

import io

import pytest

from spap_jax.cli import console
from spap_jax.cli.standard_streams import Lines
from spap_jax.errors import warn
from spap_jax.quantities import bytes_text, change_text, count_text, duration_text, peak_text, percent_text
from spap_jax.report.schema import Check

PATHS = [f"/a/long/way/down/to/the/folder/of/the/checkpoint-{number}" for number in (1, 2)]
SPEED = (("", *PATHS, "ratio"), [("prefill, tokens/s", "15342.9", "11011.1", "0.718x")])
MEMORY = (
    ("phase", "weights", "streams", "largest moments", "together"),
    [("alternating", "2.61", "6.29", "", "14.7"), ("joint steps", "2.34", "6.29", "1 234 567", "41.1 MB")],
)


@pytest.mark.parametrize("columns", [30, 50, 60, 80, 200])
@pytest.mark.parametrize(("heads", "rows"), [SPEED, MEMORY])
def test_no_word_of_a_table_is_broken_or_cut(
    heads: tuple[str, ...],
    rows: list[tuple[str, ...]],
    columns: int,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    """Numbers are not broken either; only a word that is longer than a line exceeds the line length."""
    monkeypatch.setattr(console.out, "width", columns)
    console.table("title", heads, rows)
    printed = capsys.readouterr().out
    words = printed.split()
    names = [*heads, *(row[0] for row in rows)]
    assert {word for name in names for word in name.split()} <= {*words}
    assert all(number in printed for row in rows for number in row[1:])
    assert all(len(line) <= columns or any(path in line for path in PATHS) for line in printed.splitlines())


def test_a_table_that_is_too_wide_is_a_list(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(console.out, "width", 30)
    console.table("title", *MEMORY)
    assert capsys.readouterr().out.splitlines() == [
        "title",
        "phase alternating",
        "  weights          2.61",
        "  streams          6.29",
        "  together         14.7",
        "phase joint steps",
        "  weights          2.34",
        "  streams          6.29",
        "  largest moments  1 234 567",
        "  together         41.1 MB",
    ]


def test_names_with_brackets_are_shown_as_they_are(capsys):
    with console.waiting("reading [red]model[/red] [/x] my/set:ok:0.5"):
        pass
    console.table("[b]title[/b]", ("", "[i]"), [("[/row]", "1")])
    said = capsys.readouterr()
    assert said.err == "reading [red]model[/red] [/x] my/set:ok:0.5 ...\n"
    assert "[b]title[/b]" in said.out
    assert "[/row]" in said.out


def test_a_table_without_rows(capsys):
    console.table("title", ("task", "metric value"), [])
    assert capsys.readouterr().out.splitlines()[:2] == ["title", "task   metric value"]


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
def test_lines_break_between_words_on_a_terminal_alone(
    written: io.StringIO, term: str, is_terminal: bool, monkeypatch: pytest.MonkeyPatch
):
    """Paths and options are not broken, and numbers stay with their units."""
    monkeypatch.setenv("TERM", term)
    monkeypatch.setenv("FORCE_COLOR", "1")  # makes no file a terminal
    line = "wrote /a/long/way/to/a/folder in the end, of 1 234 MB with --some-option and so on"
    Lines(file=written, width=22, highlight=False).print(line)
    lines = [line]
    if is_terminal:
        lines = [
            "wrote",
            "  /a/long/way/to/a/folder",
            "  in the end, of",
            "  1 234 MB with",
            "  --some-option and so",
            "  on",
        ]
    assert written.getvalue().splitlines() == lines


def test_what_is_shown_of_names_that_others_chose(capsys, monkeypatch: pytest.MonkeyPatch):
    """No password while a spinner turns, and no code that a terminal would obey in a warning."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(console, "err", Lines(file=Screen(), width=80))
    with console.waiting("reading https://me:secret@host/x, https://token@host/y, abfs://part@store/z"):
        pass
    shown = console.err.file.getvalue()  # type: ignore[attr-defined]
    assert "reading https://host/x, https://host/y, abfs://part@store/z ..." in shown
    monkeypatch.undo()
    with console.notices():
        warn("config.json names a\x1b[2J\nwrote out")
    assert capsys.readouterr().err == "spap: warning: config.json names a\\x1b[2J\\nwrote out\n"


def test_how_far_some_work_is_without_a_terminal(capsys):
    """The task is printed at once, and progress every ten seconds; the first piece is not timed, since it compiles."""
    now = [0.0]
    with console.counting(clock=lambda: now[0]) as watch:
        for done, seconds in ((0, 0), (10, 9), (20, 2), (30, 5), (40, 5), (100, 9)):
            now[0] += seconds
            watch("measuring", done, 100)
    assert capsys.readouterr().err.splitlines() == [
        "measuring ...",
        "measuring 20%, about 16 s left ...",
        "measuring 40%, about 24 s left ...",
    ]


def test_how_far_training_is(capsys):
    now = [0.0]
    with console.training_progress(100, clock=lambda: now[0]) as watch:
        for step, seconds in ((0, 60), (25, 90), (50, 30), (75, 40), (100, 40)):
            now[0] += seconds
            watch(Check(step, step, (2.0,) if step else (), 1.5, step < 100, 0.1))
    assert capsys.readouterr().err.splitlines() == [
        "step 0/100  held out 1.5000",
        "step 25/100  loss 2.0000, held out 1.5000",
        "step 50/100  loss 2.0000, held out 1.5000, about 60 s left",
        "step 75/100  loss 2.0000, held out 1.5000, about 35 s left",
        "step 100/100  loss 2.0000, held out 1.5000, not kept",
    ]


def test_sizes_in_words():
    assert [bytes_text(n) for n in (0, 999, 999.6, 1e3, 1.234e9, 5e15)] == [
        "0 B",
        "999 B",
        "1 kB",
        "1 kB",
        "1.23 GB",
        "5e+03 TB",
    ]
    assert count_text(1234567) == "1 234 567"
    assert [peak_text(2 * 10**9, device) for device in (None, 6 * 10**10)] == ["2 GB", "2 GB, of a device 60 GB"]
    assert change_text(4, 3) == "-25.0 %"
    assert [percent_text(part) for part in (1.2, 0.356, 0.0593, 0.00123)] == ["120.0 %", "35.6 %", "5.9 %", "0.12 %"]
    assert [duration_text(seconds, digits=2) for seconds in (0.0912, 81.4, 118, 2340, 5400, 400000)] == [
        "0.091 s",
        "81 s",
        "120 s",
        "39 min",
        "90 min",
        "4.6 days",
    ]
