"""Valid but probably unintended requests cause a one-line warning on standard error."""

from pathlib import Path

import pytest
from commands import CALIBRATION, STORIES, spap

PRUNE, FINETUNE = ("prune", STORIES, "--data"), ("finetune", STORIES, "--data")


@pytest.mark.parametrize(
    ("command", "words", "code"),
    [
        (PRUNE, ("--sequences", "8", "--method", "magnitude"), 0),
        (FINETUNE, ("--sequences", "1"), 2),  # nothing could be held out
    ],
)
def test_blank_text(command: tuple, words: tuple, code: int, tmp_path: Path, capsys):
    blank = tmp_path / "blank.txt"
    blank.write_text("\n" * 10_000)
    said = spap(capsys, *command, blank, "--output", tmp_path / "out", "--sequence-length", "64", *words)
    assert said.code == code
    (line,) = [line for line in said.err.splitlines() if "warning" in line]
    assert line.startswith(f"spap: warning: {blank} gives ")
    assert "with only 1 distinct value: they show little of what a model has to do" in line


def test_ordinary_text(tmp_path: Path, capsys):
    words = ("--output", tmp_path / "out", "--sequences", "8", "--sequence-length", "64", "--method", "magnitude")
    assert "warning" not in spap(capsys, *PRUNE, CALIBRATION, *words).err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ("--method", "wanda", "--rounds", "3"),
            ["--rounds has no effect: the update none has no rounds and no joint steps."],
        ),
        (("--joint-passes", "0", "--joint-last", "9"), ["--joint-last has no effect: there are no joint steps."]),
        (
            ("--rounds", "0", "--joint-passes", "0", "--effort", "low"),
            ["--effort has no effect: there are no joint steps."],
        ),
        (("--method", "osscar", "--update", "alternate", "--rounds", "3"), []),
    ],
)
def test_options_without_effect(words: tuple[str, ...], expected: list[str], tmp_path: Path, capsys):
    (tmp_path / "unreadable.txt").write_bytes(b"\xff")
    place = ("--output", tmp_path / "out", *PRUNE[2:], tmp_path / "unreadable.txt")
    said = spap(capsys, "prune", STORIES, *place, *words)
    assert said.code == 2
    assert [line.removeprefix("spap: warning: ") for line in said.err.splitlines() if "warning" in line] == expected
