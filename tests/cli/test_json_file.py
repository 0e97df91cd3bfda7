"""``--json FILE``: validated before any work, and written completely or not at all."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import STORIES, left, sentence, spap

from spap_jax.checkpoint.manifest import sealed
from spap_jax.cli.json_file import write_json
from spap_jax.errors import UserError

LONG = {"numbers": [*range(5000)]}
OLD = sealed(b'{"written_by": "spap eval"}').decode()


@pytest.mark.parametrize("command", [("eval", STORIES, "--data", "none.txt"), ("bench", "none")])
@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("no/x.json", "there is no folder no)"),
        (".", ". is a folder: name a file."),
        ("/proc/x.json", "/proc/x.json cannot be written (No such file or directory): name another file."),
        ("x" * 300, "xxx cannot be written (File name too long): name another file."),
    ],
)
def test_a_place_that_cannot_be(command: tuple, place: str, expected: str, tmp_path: Path, capsys, monkeypatch) -> None:
    """The error is reported before the missing model or data are."""
    monkeypatch.chdir(tmp_path)
    assert expected in sentence(spap(capsys, *command, "--json", place))
    assert left(tmp_path) == []


def test_a_disk_that_fills_up_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "found.json").write_text(OLD)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, before[1]))
    try:
        for name in ("found.json", "new.json"):
            with pytest.raises(UserError, match="cannot be written"):
                write_json(tmp_path / name, "spap eval", LONG)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert left(tmp_path) == ["found.json"]
    assert (tmp_path / "found.json").read_text() == OLD


def test_a_link_and_a_pipe_stay_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "real.json").write_text(OLD)
    (tmp_path / "link.json").symlink_to("real.json")
    write_json(tmp_path / "link.json", "spap eval", LONG)
    assert (tmp_path / "link.json").is_symlink()
    written = json.loads((tmp_path / "real.json").read_text())
    assert len(written.pop("sha256")) == 64
    assert written == {"written_by": "spap eval", **LONG}
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_json(tmp_path / "pipe", "spap eval", {"one": 1})
        assert json.loads(os.read(reader, 200))["one"] == 1
    finally:
        os.close(reader)
    assert (tmp_path / "pipe").is_fifo()


def test_a_pipe_without_a_name() -> None:
    """As in `--json >(gzip > s.gz)` and `--json /dev/stdout | cat`: the link leads to no path."""
    reader, writer = os.pipe()
    try:
        write_json(Path(f"/dev/fd/{writer}"), "spap eval", {"one": 1})
        assert json.loads(os.read(reader, 200))["one"] == 1
    finally:
        os.close(reader)
        os.close(writer)


OTHERS = ["a letter", "{}", '{"written_by": "spap eval"}', f"{OLD}\nnotes", OLD.replace("spap eval", "spap bench")]


def test_standard_output_that_a_shell_sent_to_a_file(tmp_path: Path) -> None:
    """The numbers follow what was printed, and no file of the user's is replaced."""
    program = "from pathlib import Path; from spap_jax.cli.json_file import check_json_place, write_json; "
    program += "place = Path('/dev/stdout'); check_json_place(place, 'spap eval'); print('a table'); "
    program += "write_json(place, 'spap eval', {'one': 1})"
    with open(tmp_path / "kept", "w") as kept:
        subprocess.run([sys.executable, "-c", program], stdout=kept, check=True)
    table, _, numbers = (tmp_path / "kept").read_text().partition("\n")
    assert table == "a table"
    assert json.loads(numbers)["one"] == 1


def test_a_number_that_is_not_finite_is_null(tmp_path: Path) -> None:
    """As JSON has none; a measure of lm-evaluation-harness may be infinite."""
    write_json(tmp_path / "a.json", "spap eval", {"score": float("inf"), "count": np.int64(3), "at": {"x": np.nan}})
    found = json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail)
    assert (found["score"], found["count"], found["at"]) == (None, 3, {"x": None})


@pytest.mark.parametrize("content", [*OTHERS, sealed(b'{"written_by": "spap bench"}').decode()])
def test_what_the_command_did_not_write_is_never_replaced(content: str, tmp_path: Path, capsys) -> None:
    """The error is reported before the missing data are, and checked again when the numbers are written."""
    file = tmp_path / "found.json"
    file.write_text(content)
    expected = (
        f"{file} is not a file that spap eval wrote, or was changed since, so it is not replaced: name another file."
    )
    assert sentence(spap(capsys, "eval", STORIES, "--data", "none.txt", "--json", file)) == expected
    with pytest.raises(UserError, match="so it is not replaced"):
        write_json(file, "spap eval", LONG)
    assert file.read_text() == content
