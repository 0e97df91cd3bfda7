"""What commands print: tables, names and sizes."""

import re

import pytest

from spap_jax.cli import console


def test_names_that_are_too_long_are_not_cut(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Two paths that differ at their ends have to differ in the table."""
    monkeypatch.setenv("COLUMNS", "80")
    names = [f"/a/long/way/down/to/the/folder/of/the/checkpoint-{number}" for number in (1, 2)]
    console.table("speed", ("", *names, "ratio"), [("prefill, tokens/s", "15342.9", "11011.1", "0.718x")])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert all(number in lines[-1] for number in ("15342.9", "11011.1", "0.718x"))
    head = [re.split(r"\s{2,}", line.strip().removesuffix("ratio").strip()) for line in lines[1:-2]]
    assert ["".join(parts) for parts in zip(*head, strict=True)] == names


def test_names_with_brackets_are_shown_as_they_are(capsys):
    with console.waiting("reading [red]model[/red] [/x]"):
        pass
    console.table("[b]title[/b]", ("", "[i]"), [("[/row]", "1")])
    said = capsys.readouterr()
    assert said.err == "reading [red]model[/red] [/x] ...\n"
    assert "[b]title[/b]" in said.out
    assert "[/row]" in said.out


def test_sizes_in_words():
    assert [console.bytes_text(n) for n in (0, 999, 1e3, 1.234e9, 5e15)] == [
        "0 B",
        "999 B",
        "1 kB",
        "1.23 GB",
        "5e+03 TB",
    ]
    assert console.count_text(1234567) == "1 234 567"
    assert console.change_text(4, 3) == "-25.0 %"
