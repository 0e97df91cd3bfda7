"""Either all files are written or none."""

from pathlib import Path

import pytest

from spap_jax.errors import UserError
from spap_jax.report.write import write_all


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_files_and_their_folders_are_made(tmp_path: Path) -> None:
    write_all({tmp_path / "new" / "a.png": b"a", tmp_path / "page.html": b"b"}, overwrite=False)
    assert files(tmp_path) == {"new/a.png": b"a", "page.html": b"b"}


PAGE = b'<!DOCTYPE html>\n<html><meta name="generator" content="spap report">'


def test_what_is_there_is_replaced_only_when_asked(tmp_path: Path) -> None:
    old = PAGE
    (tmp_path / "page.html").write_bytes(old)
    wanted = {tmp_path / "a.png": b"a", tmp_path / "page.html": b"b"}
    with pytest.raises(UserError, match=r"page\.html exists: name another place, or pass overwrite=True"):
        write_all(wanted, overwrite=False)
    assert files(tmp_path) == {"page.html": old}
    write_all(wanted, overwrite=True)
    assert files(tmp_path) == {"a.png": b"a", "page.html": b"b"}


def test_a_letter_at_home_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "page.html").write_bytes(b"a letter")
    for overwrite, said in ((False, "exists"), (True, "is not a file that spap report wrote")):
        with pytest.raises(UserError, match=rf"~/page\.html {said}"):
            write_all({Path("~/page.html"): b"b"}, overwrite)
    assert files(tmp_path) == {"page.html": b"a letter"}


@pytest.mark.parametrize("content", [b"a letter", b"<!DOCTYPE html><p>spap report", b""])
def test_what_the_command_did_not_write_is_never_replaced(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.png"):
        write_all({tmp_path / "page.html": b"b", tmp_path / "a.png": b"a"}, overwrite=True)
    assert files(tmp_path) == {"a.png": content}


def test_a_folder_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "page.html").mkdir()
    with pytest.raises(UserError, match="is a folder: name a file"):
        write_all({tmp_path / "page.html": b"b"}, overwrite=True)


def test_when_one_cannot_be_written_none_is(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"in the way")
    with pytest.raises(UserError, match=r"file/page\.html cannot be written \(.*\): name another place"):
        write_all({tmp_path / "a.png": b"a", tmp_path / "file" / "page.html": b"b"}, overwrite=False)
    assert files(tmp_path) == {"file": b"in the way"}
