"""Valid but probably unintended requests cause a one-line warning on standard error."""

import json
from pathlib import Path

import pytest
from commands import CALIBRATION, STORIES, spap

from spap_jax import memory

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
        (("--joint-passes", "0", "--joint-tokens", "9"), ["--joint-tokens has no effect: there are no joint steps."]),
        (("--rounds", "0", "--steps", "9"), ["--steps has no effect: there are no rounds."]),
        (
            ("--rounds", "0", "--joint-passes", "0", "--effort", "low"),
            ["--effort has no effect: there are neither rounds nor joint steps."],
        ),
        (
            ("--method", "obs", "--swap-rounds", "9", "--penalty", "9", "--penalty-stages", "9"),
            [
                "--penalty, --penalty-stages have no effect: the method obs has no penalty.",
                "--swap-rounds has no effect: the method obs makes no swaps.",
            ],
        ),
        (
            ("--method", "flap", "--correction", "0", "--ridge", "0.1"),
            ["--correction, --ridge have no effect: the method flap with the update bias solves for no weights."],
        ),
        (("--method", "obs", "--update", "none", "--correction", "0"), []),
        (("--method", "osscar", "--swap-rounds", "9", "--update", "alternate", "--rounds", "3"), []),
    ],
)
def test_options_without_effect(words: tuple[str, ...], expected: list[str], tmp_path: Path, capsys):
    (tmp_path / "unreadable.txt").write_bytes(b"\xff")
    place = ("--output", tmp_path / "out", *PRUNE[2:], tmp_path / "unreadable.txt")
    said = spap(capsys, "prune", STORIES, *place, *words)
    assert said.code == 2
    assert [line.removeprefix("spap: warning: ") for line in said.err.splitlines() if "warning" in line] == expected


def test_a_machine_that_is_too_small(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    """The warning comes before the calibration text is read, and stops nothing."""
    monkeypatch.setattr(memory, "of_machine", lambda: 100_000)
    (tmp_path / "unreadable.txt").write_bytes(b"\xff")
    said = spap(capsys, "prune", STORIES, *PRUNE[2:], tmp_path / "unreadable.txt", "--output", tmp_path / "out")
    assert said.code == 2
    [line] = [line for line in said.err.splitlines() if "warning" in line]
    assert line.startswith("spap: warning: a plan of this run needs ")
    assert "a device here has 100 kB. " in line


def test_joint_steps_on_as_many_blocks_as_fit_in_memory(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    words = ("--sequences", "8", "--sequence-length", "64", "--joint-passes", "1", "--rounds", "0")
    words = (*words, "--joint-last", "4", "--method", "magnitude", "--update", "alternate")
    monkeypatch.setattr(memory, "of_machine", lambda: 16_000_000)
    said = spap(capsys, *PRUNE, CALIBRATION, *words, "--output", tmp_path / "out")
    assert said.code == 0
    assert "joint steps will adjust 2 blocks at a time, as many as fit in memory" in said.err
    assert json.loads((tmp_path / "out" / "spap_report.json").read_text())["settings"]["joint_blocks"] == 2
