"""Valid but probably unintended requests cause a one-line warning on standard error."""

from pathlib import Path

import pytest
from commands import STORIES, spap


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
    place = ("--output", tmp_path / "out", "--data", tmp_path / "unreadable.txt")
    said = spap(capsys, "prune", STORIES, *place, *words)
    assert said.code == 2
    assert [line.removeprefix("spap: warning: ") for line in said.err.splitlines() if "warning" in line] == expected
