"""``--json FILE``: checked before any work, and written completely or not at all; nothing is replaced."""

import json
import os
import resource
from pathlib import Path

import numpy as np
import pytest
from commands import STORIES, left, sentence, spap, tiny, token_file

from spap_jax.cli.options import write_json
from spap_jax.errors import UserError

LONG = {"numbers": [*range(5000)]}


@pytest.mark.parametrize("command", [("eval", STORIES, "--data", "none.txt"), ("bench", "none")])
def test_a_place_that_cannot_be_is_refused_before_any_work(command: tuple, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "letter.json").write_text("dear")
    for place in ("no/x.json", ".", "letter.json"):
        assert sentence(spap(capsys, *command, "--json", place)).startswith(place)
    assert left(tmp_path) == ["letter.json"]
    assert (tmp_path / "letter.json").read_text() == "dear"


def test_a_disk_that_fills_up_leaves_no_part_of_a_file(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, before[1]))
    try:
        with pytest.raises(UserError, match="cannot be written"):
            write_json(tmp_path / "new.json", "spap eval", LONG)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert left(tmp_path) == []


def test_what_came_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("dear")
    with pytest.raises(UserError, match="exists"):
        write_json(tmp_path / "x.json", "spap eval", LONG)
    assert (tmp_path / "x.json").read_text() == "dear"


def test_a_pipe_is_written_to() -> None:
    """As in `--json >(gzip > s.gz)` and `--json /dev/stdout | cat`."""
    reader, writer = os.pipe()
    try:
        write_json(Path(f"/dev/fd/{writer}"), "spap eval", {"one": 1})
        assert json.loads(os.read(reader, 200)) == {"written_by": "spap eval", "one": 1}
    finally:
        os.close(reader)
        os.close(writer)


def test_a_number_that_is_not_finite_is_null(tmp_path: Path) -> None:
    """As JSON has none; a measure of lm-evaluation-harness may be infinite."""
    write_json(tmp_path / "a.json", "spap eval", {"score": float("inf"), "count": np.int64(3), "at": {"x": np.nan}})
    found = json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail)
    assert (found["score"], found["count"], found["at"]) == (None, 3, {"x": None})


def test_the_number_is_printed_although_its_file_cannot_be_written(tmp_path: Path, capsys):
    model, ids = tiny(tmp_path / "in"), token_file(tmp_path / "ids.npy")
    said = spap(capsys, "eval", model, "--data", ids, "--sequence-length", "64", "--json", "/dev/full")
    assert said.code == 2
    assert said.out.startswith("perplexity ")
    assert said.err.splitlines()[-1].startswith("spap: /dev/full cannot be written")
