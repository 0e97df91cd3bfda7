"""Valid but probably unintended requests cause a one-line warning on standard error."""

from pathlib import Path

import numpy as np
import pytest
from commands import STORIES, spap, succeed

from spap_jax import load_tokens


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


def test_text_that_only_joint_steps_would_read_overlaps_nothing_without_them(tmp_path: Path, capsys):
    ids = np.random.default_rng(0).integers(3, 500, (64, 16))
    np.save(tmp_path / "ids.npy", ids)
    drawn = load_tokens(tmp_path / "ids.npy", tokenizer=STORIES, sequence_length=16, sequences=4, role="calibration")
    assert drawn.further is not None
    np.save(tmp_path / "further.npy", drawn.further.tokens)
    place = ("--data", tmp_path / "ids.npy", "--sequences", 4, "--sequence-length", 16, "--output", tmp_path / "out")
    said = succeed(capsys, "prune", STORIES, *place, "--eval", tmp_path / "further.npy", "--method", "magnitude")
    assert "warning" not in said.err
