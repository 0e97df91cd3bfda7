"""``--json FILE``: looked at before any work, and whole or absent."""

import json
import os
import resource
from pathlib import Path

import pytest
from commands import STORIES, left, sentence, spap

from spap_jax.cli.json_file import write_json
from spap_jax.errors import UserError

LONG = {"numbers": [*range(5000)]}


@pytest.mark.parametrize("command", [("eval", STORIES, "--data", "none.txt"), ("bench", "none")])
@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("no/x.json", "there is no folder no)"),
        (".", ". is a folder: name a file."),
        ("x" * 300, "xxx cannot be written (File name too long): name another file."),
    ],
)
def test_a_place_that_cannot_be(command: tuple, place: str, expected: str, tmp_path: Path, capsys, monkeypatch) -> None:
    """Said before the model or the data are found not to be there."""
    monkeypatch.chdir(tmp_path)
    assert expected in sentence(spap(capsys, *command, "--json", place))
    assert left(tmp_path) == []


def test_a_disk_that_fills_up_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "found.json").write_text("{}")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, before[1]))
    try:
        for name in ("found.json", "new.json"):
            with pytest.raises(UserError, match="cannot be written"):
                write_json(tmp_path / name, LONG)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert left(tmp_path) == ["found.json"]
    assert (tmp_path / "found.json").read_text() == "{}"


def test_a_link_and_a_pipe_stay_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "real.json").write_text("{}")
    (tmp_path / "link.json").symlink_to("real.json")
    write_json(tmp_path / "link.json", LONG)
    assert (tmp_path / "link.json").is_symlink()
    assert json.loads((tmp_path / "real.json").read_text()) == LONG
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_json(tmp_path / "pipe", {"one": 1})
        assert json.loads(os.read(reader, 100)) == {"one": 1}
    finally:
        os.close(reader)
    assert (tmp_path / "pipe").is_fifo()
