"""What is done as asked but likely not meant is warned of in one line on standard error."""

from pathlib import Path

import pytest
from commands import CALIBRATION, STORIES, spap

PRUNE, FINETUNE = ("prune", STORIES, "--calibration"), ("finetune", STORIES, "--data")


@pytest.mark.parametrize(
    ("command", "unmet"),
    [
        (PRUNE, ("--sequences", "8", "--devices", "99")),
        (FINETUNE, ("--sequences", "1")),
    ],
)
def test_blank_text(command: tuple, unmet: tuple, tmp_path: Path, capsys):
    """Said before anything is computed, which a demand that cannot be met prevents here."""
    blank = tmp_path / "blank.txt"
    blank.write_text("\n" * 10_000)
    said = spap(capsys, *command, blank, "--output", tmp_path / "out", "--sequence-length", "64", *unmet)
    assert said.code == 2
    (line,) = [line for line in said.err.splitlines() if "warning" in line]
    assert line.startswith(f"spap: warning: {blank} gives ")
    assert "with only 1 distinct value: they show little of what a model has to do" in line


def test_ordinary_text(tmp_path: Path, capsys):
    words = ("--output", tmp_path / "out", "--sequences", "8", "--sequence-length", "64", "--devices", "99")
    assert "warning" not in spap(capsys, *PRUNE, CALIBRATION, *words).err
