"""An existing output is replaced only if this program wrote all of it, and nothing is lost in between."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_checkpoints import raw_tensors, write
from trees import hashes

from spap_jax.checkpoint import check_output, load, new_folder, save, save_orbax
from spap_jax.checkpoint.manifest import sealed
from spap_jax.errors import UserError
from spap_jax.models.model import Model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load(write("llama", tmp_path_factory.mktemp("source") / "in"))


@pytest.fixture
def out(model: Model, tmp_path: Path) -> Path:
    """A checkpoint that this program wrote."""
    save(model, tmp_path / "out", files={"card.md": "one"})
    return tmp_path / "out"


def make(folder: Path, content: str = "new") -> None:
    """Writes an output of one file, as a command with --overwrite does."""
    with new_folder(folder, overwrite=True, source=None) as partial:
        (partial / "file").write_text(content)


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def a_repository(out: Path) -> None:
    (out / ".git" / "refs").mkdir(parents=True)
    (out / ".git" / "HEAD").write_text("ref: refs/heads/main")


def a_link_in_place_of_the_weights(out: Path) -> None:
    weights = (out / "model.safetensors").rename(out.parent / "moved")
    (out / "model.safetensors").symlink_to(weights)


def weights_that_another_tool_trained(out: Path) -> None:
    """Changes the weights without changing the file size."""
    content = bytearray((out / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (out / "model.safetensors").write_bytes(content)


PAGE = b'<!DOCTYPE html>\n<html><head><meta charset="utf-8">\n<meta name="generator" content="spap report"><p>one'
NUMBERS = b'{\n "written_by": "spap eval",\n "perplexity": 7.5\n}'


def changed_since(content: bytes) -> bytes:
    return sealed(content)[:-5] + b"6" + content[-4:]


ADDED: list[tuple[Callable[[Path], object], str]] = [
    (lambda out: (out / "notes.txt").write_text("dear"), r"\(notes\.txt\)"),
    (lambda out: (out / ".hidden").write_text(""), r"\(\.hidden\)"),
    (a_repository, r"\(\.git/HEAD\)"),
    (lambda out: [(out / f"{n}.txt").touch() for n in range(5)], r"\(0\.txt, 1\.txt, 2\.txt and 2 more\)"),
    (lambda out: (out / "card.md").write_text("my own words"), r"\(card\.md\)"),
    (lambda out: (out / "config.json").write_text("{}"), r"\(config\.json\)"),
    (lambda out: (out / "link").symlink_to("/nowhere"), r"\(link\)"),
    (lambda out: (out / "folder").symlink_to(out.parent), r"\(folder\)"),
    (lambda out: os.mkfifo(out / "pipe"), r"\(pipe\)"),
    (a_link_in_place_of_the_weights, r"\(model\.safetensors\)"),
    (weights_that_another_tool_trained, r"\(model\.safetensors\)"),
    (lambda out: (out / "spap_files.json").unlink(), r"\(card\.md, config\.json, .* and 2 more\)"),
    (lambda out: (out / "spap_files.json").write_text("[]"), r"\(card\.md, config\.json, .* and 3 more\)"),
    (lambda out: (out / "page.html").write_text("<!DOCTYPE html><p>spap report"), r"\(page\.html\)"),
    (lambda out: (out / "page.html").write_bytes(PAGE), r"\(page\.html\)"),
    (lambda out: (out / "page.html").write_bytes(changed_since(PAGE)), r"\(page\.html\)"),
    (lambda out: (out / "found.json").write_bytes(changed_since(NUMBERS)), r"\(found\.json\)"),
]


@pytest.mark.parametrize(("add", "named"), ADDED)
def test_what_others_put_there_is_never_lost(
    add: Callable[[Path], object], named: str, model: Model, out: Path, tmp_path: Path
):
    add(out)
    before = hashes(tmp_path)
    with pytest.raises(UserError, match=rf"out is not overwritten, because it holds files that .* {named}: name"):
        save(model, out, overwrite=True)
    with pytest.raises(UserError, match="is not overwritten"):
        save_orbax(model, out, overwrite=True)
    assert hashes(tmp_path) == before


def test_a_model_that_was_downloaded_is_never_replaced(model: Model, tmp_path: Path):
    theirs = write("llama", tmp_path / "theirs")
    before = hashes(theirs)
    with pytest.raises(UserError, match=r"\(config\.json, generation_config\.json, model\.safetensors and 1 more\)"):
        save(model, theirs, overwrite=True)
    assert hashes(theirs) == before


@pytest.mark.parametrize("content", [None, "[]", '{"letter.txt": "0"}', "\udcff"])
def test_a_manifest_that_says_something_else(content: str | None, tmp_path: Path):
    home = tmp_path / "home"
    home.mkdir()
    (home / "letter.txt").write_text("dear")
    if content is not None:
        (home / "spap_files.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=r"home is not overwritten.*letter\.txt"):
        make(home)
    assert (home / "letter.txt").read_text() == "dear"


def test_what_this_program_wrote_is_replaced(model: Model, out: Path, tmp_path: Path):
    save_orbax(model, out, overwrite=True)
    (out / "spap_report.html").write_bytes(sealed(PAGE))
    (out / "found.json").write_bytes(sealed(NUMBERS))
    (out / "params" / "empty").mkdir()
    (out / "generation_config.json").unlink()
    save(model, out, overwrite=True)
    assert raw_tensors(out).keys()
    assert left(out) == ["config.json", "generation_config.json", "model.safetensors", "spap_files.json",
                         "tokenizer.json"]  # fmt: skip
    shutil.copytree(out, tmp_path / "copy")
    save(model, tmp_path / "copy", overwrite=True)
    assert left(tmp_path) == ["copy", "out"]


@pytest.mark.parametrize("place", ["in", "in/new", "in/new/deep", ".", "../{name}/in", "link", "link/new", "IN/../in/"])
def test_a_model_is_not_saved_over_or_into_or_around_its_source(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model = load(write("llama", tmp_path / "in"))
    (tmp_path / "link").symlink_to("in")
    (tmp_path / "IN").mkdir()
    before = hashes(tmp_path)
    monkeypatch.chdir(tmp_path)
    for write_it in (save, save_orbax):
        for overwrite in (False, True):
            with pytest.raises(UserError, match=rf"^the output \S+ (is|lies inside|contains) the model {tmp_path}/in"):
                write_it(model, place.format(name=tmp_path.name), overwrite=overwrite)
    assert hashes(tmp_path) == before


def test_a_file_that_appears_while_the_output_is_made_is_kept(out: Path, tmp_path: Path):
    def write_slowly() -> None:
        with new_folder(out, overwrite=True, source=None) as partial:
            (partial / "file").write_text("new")
            (out / "notes.txt").write_text("dear")

    with pytest.raises(UserError, match=r"\(notes\.txt\)"):
        write_slowly()
    assert left(tmp_path) == ["out"]
    assert (out / "notes.txt").read_text() == "dear"
    assert (out / "card.md").exists()


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("", "the output has no name: name the folder to write."),
        (" ", "the output has no name"),
        ("/", "the output / is the root of a file system: name a folder in it."),
        ("a\0b", "null character"),
        (".", "is the folder that this command runs in, or contains it, so it cannot be replaced"),
        ("..", "is the folder that this command runs in, or contains it"),
        ("sub/..", "is the folder that this command runs in, or contains it"),
        ("/proc", "is a mounted disk, which cannot be replaced|cannot be made in"),
        ("/proc/foo", r"/proc/foo cannot be made in /proc \(No such file or directory\): name another place\."),
        ("x" * 250, r"cannot be made in .* \(File name too long\): name another place\."),
        (f"new/{'x' * 300}/out", r"cannot be made in .* \(File name too long\)"),
        ("file", "file is a file and the output is a folder: name another place."),
        ("file/out", "out cannot be made because .*file is a file: name another place."),
        ("loop", "loop is a link that leads nowhere: name another place."),
        (".out.resume", r"lies in \.out\.resume, a name under which unfinished runs are kept"),
        (".out.resume/output", r"lies in \.out\.resume, a name"),
        (".out.partial-0123abcd", r"lies in \.out\.partial-0123abcd, a name"),
        (".out.replaced-0123abcd/new", r"lies in \.out\.replaced-0123abcd, a name"),
        ("gs://bucket/a/../b", "has a part . or .., which no store resolves: write out the address"),
        ("gs://bucket/..", "has a part . or .."),
        *((f"gs://bucket/{name}", r"holds a \*, \? or \[, with which") for name in ("run*", "run?", "runs[1]/out")),
    ],
)
def test_names_that_no_output_can_have(output: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "here" / "sub").mkdir(parents=True)
    (tmp_path / "here" / "file").write_text("dear")
    (tmp_path / "here" / "loop").symlink_to("loop")
    monkeypatch.chdir(tmp_path / "here")
    before = hashes(tmp_path)
    with pytest.raises(UserError, match=expected):
        check_output(output, overwrite=True, inputs={})
    assert hashes(tmp_path) == before


def test_a_place_on_a_disk_that_is_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(path: str, *_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)

    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(UserError, match=r"out cannot be made in .* \(Read-only file system\)"):
        check_output(tmp_path / "out", inputs={})


def test_a_disk_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Mounting takes rights that tests often lack, so that the folder only says that it is a mounted disk."""
    disk = tmp_path / "disk"
    disk.mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda self: self == disk)
    with pytest.raises(UserError, match="disk is a mounted disk, which cannot be replaced: name a new folder in"):
        check_output(disk, overwrite=True, inputs={})


def test_the_folder_that_a_link_leads_to_is_looked_at(out: Path, tmp_path: Path):
    (tmp_path / "link").symlink_to("out")
    make(tmp_path / "link/")
    assert (tmp_path / "link").is_symlink()
    assert left(out) == ["file", "spap_files.json"]
    (out / "notes.txt").write_text("dear")
    with pytest.raises(UserError, match=r"out is not overwritten, .*\(notes\.txt\)"):
        make(tmp_path / "link")


MOVED_ASIDE = """
import os, signal, sys
from pathlib import Path
from spap_jax.checkpoint import new_folder
rename = Path.rename
def kill_after(self, target):
    rename(self, target)
    if "replaced" in target.name:
        os.kill(os.getpid(), signal.SIGKILL)
Path.rename = kill_after
with new_folder(sys.argv[1], overwrite=True, source=None) as partial:
    (partial / "file").write_text("new")
"""


def test_killed_between_the_two_renames(out: Path, tmp_path: Path):
    """The next run that checks the output path restores the old output, even if that run is refused."""
    before = hashes(out)
    program = [sys.executable, "-c", MOVED_ASIDE, str(out)]
    assert subprocess.run(program, capture_output=True).returncode == -signal.SIGKILL
    assert not out.exists()
    with pytest.raises(UserError, match="out exists: name another folder"):
        check_output(out, inputs={})
    assert hashes(out) == before
    make(out)
    assert left(out) == ["file", "spap_files.json"]


def test_an_old_output_that_was_being_removed_does_not_come_back(out: Path, tmp_path: Path):
    aside = out.rename(tmp_path / ".out.replaced-0123abcd")
    (aside / "model.safetensors").unlink()
    assert check_output(out, inputs={}) == out
    assert left(tmp_path) == [aside.name]
    make(out)
    assert left(tmp_path) == ["out"]


def test_what_could_not_be_removed_is_named_and_removed_the_next_time(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as failing:
        failing.setattr(Path, "unlink", lambda *_, **__: (_ for _ in ()).throw(OSError("busy")))
        with pytest.warns(match=rf"what was replaced could not be removed whole: delete {tmp_path}/\.out\.replaced-"):
            make(out)
    assert (out / "file").read_text() == "new"
    assert [name.partition("-")[0] for name in left(tmp_path)] == [".out.replaced", "out"]
    make(out, "newer")
    assert left(tmp_path) == ["out"]


def test_what_is_put_into_a_folder_that_was_moved_aside_stays(out: Path, tmp_path: Path):
    aside = shutil.copytree(out, tmp_path / ".out.replaced-0123abcd")
    (aside / "notes.txt").write_text("dear")
    with pytest.warns(match=r"could not be removed whole: delete .*\.out\.replaced-0123abcd if you do not need it"):
        make(out)
    assert left(aside) == ["notes.txt"]
