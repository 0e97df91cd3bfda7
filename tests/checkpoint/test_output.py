"""An output folder is complete or absent, whatever happens."""

import contextlib
import errno
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_checkpoints import dtypes, raw_tensors, write

from spap_jax.checkpoint import Writer, check_output, load, new_folder, save, save_orbax
from spap_jax.errors import UserError
from spap_jax.models.model import Model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load(write("llama", tmp_path_factory.mktemp("source") / "in"))


def test_a_folder_that_cannot_be_synced(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Some network file systems sync files only; a disk that fails is another matter."""
    sync = os.fsync

    def failing(code: int):
        def fsync(handle: int) -> None:
            if stat.S_ISDIR(os.fstat(handle).st_mode):
                raise OSError(code, os.strerror(code))
            sync(handle)

        return fsync

    monkeypatch.setattr(os, "fsync", failing(errno.EINVAL))
    save(model, tmp_path / "out")
    load(tmp_path / "out")
    monkeypatch.setattr(os, "fsync", failing(errno.EIO))
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        save(model, tmp_path / "other")
    assert [each.name for each in tmp_path.iterdir()] == ["out"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of 200 KB; if mounting is not permitted, a limit on the file size is set instead."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(disk)]
    if shutil.which("mount") and subprocess.run(mount, capture_output=True).returncode == 0:
        yield disk
        subprocess.run(["umount", str(disk)], check=True)
    else:
        with short_files(200_000):
            yield disk


@contextlib.contextmanager
def short_files(limit: int) -> Iterator[None]:
    """Limits the file size, so that an error occurs midway although the free space on the disk looked sufficient."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def left(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_a_path_that_orbax_takes_for_a_pattern_is_refused_before_anything_is_written(model: Model, tmp_path: Path):
    (tmp_path / "a[x]").mkdir()
    with pytest.raises(UserError, match=r"brackets in the path: name another folder"):
        save_orbax(model, tmp_path / "a[x]" / "out")
    (tmp_path / "link").symlink_to(tmp_path / "a[x]")
    with pytest.raises(UserError, match=r"brackets in the path: name another folder"):
        save_orbax(model, tmp_path / "link" / "out")
    assert left(tmp_path / "a[x]") == []


def test_an_existing_folder_is_refused_before_any_work(model: Model, tmp_path: Path):
    save(model, tmp_path / "out")
    before = raw_tensors(tmp_path / "out")
    with pytest.raises(UserError, match=r"out exists: name another folder, or pass overwrite=True to replace it"):
        check_output(tmp_path / "out", inputs={})
    with pytest.raises(UserError, match=r"out exists"):
        Writer(tmp_path / "out", model.config, model.source, dtypes(model)).__enter__()
    with pytest.raises(UserError, match=r"out exists"):
        save_orbax(model, tmp_path / "out")
    assert raw_tensors(tmp_path / "out") == before
    assert left(tmp_path) == ["out"]


def test_overwrite_replaces_the_whole_folder(model: Model, tmp_path: Path):
    save_orbax(model, tmp_path / "out")
    save(model, tmp_path / "out", overwrite=True, files={"card.md": "one"})
    assert not (tmp_path / "out" / "params").exists()
    save(model, tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "card.md").exists()
    assert left(tmp_path) == ["out"]


def test_an_empty_folder_is_overwritten_and_a_file_is_not(model: Model, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    save(model, tmp_path / "empty", overwrite=True)
    (tmp_path / "file").write_text("x")
    for place, sentence in (("file", "is a file"), ("file/out", "because .*file is a file")):
        with pytest.raises(UserError, match=sentence):
            save(model, tmp_path / place, overwrite=True)
    assert left(tmp_path) == ["empty", "file"]


def test_a_folder_that_appears_meanwhile_is_kept(tmp_path: Path):
    def write_slowly() -> None:
        with new_folder(tmp_path / "out", source=None):
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "theirs").write_text("x")

    with pytest.raises(UserError, match="out exists"):
        write_slowly()
    assert left(tmp_path) == ["out"]
    assert left(tmp_path / "out") == ["theirs"]


def test_a_link_is_followed(model: Model, tmp_path: Path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    save(model, tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "config.json").exists()


@pytest.mark.parametrize("raised", [ValueError, KeyboardInterrupt, OSError])
def test_an_error_midway_removes_the_folder_and_passes(raised: type[BaseException], model: Model, tmp_path: Path):
    save(model, tmp_path / "out")
    before = raw_tensors(tmp_path / "out")

    def fail() -> None:
        with Writer(
            tmp_path / "out", model.config, model.source, dtypes(model), overwrite=True, shard_bytes=1
        ) as writer:
            writer.outer(model.params)
            raise raised("not about files")

    with pytest.raises(raised, match="not about files"):
        fail()
    assert left(tmp_path) == ["out"]
    assert raw_tensors(tmp_path / "out") == before


def test_a_full_disk(small_disk: Path):
    def fill() -> None:
        with new_folder(small_disk / "out", source=None) as partial:
            (partial / "half").write_bytes(bytes(100_000))
            (partial / "rest").write_bytes(bytes(300_000))

    with pytest.raises(
        UserError, match=r"the disk of .*disk filled up.*: free some space, or name a place on another disk\."
    ):
        fill()
    assert left(small_disk) == []


def test_a_disk_that_fills_up_while_weights_are_written(model: Model, tmp_path: Path):
    with (
        short_files(3000),
        pytest.raises(UserError, match=r"filled up, or a limit of it was reached.*it needs 0\.\d+ MB"),
    ):
        save(model, tmp_path / "out")
    assert left(tmp_path) == []


FULL = """
import resource, sys
from spap_jax.checkpoint import load, save_orbax
from spap_jax.errors import UserError
model = load(sys.argv[1])
for limit in (300, 3000, 30000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        save_orbax(model, sys.argv[2])
    except UserError as error:
        print(error)
"""


def test_a_disk_that_fills_up_while_orbax_writes(model: Model, tmp_path: Path):
    program = [sys.executable, "-c", FULL, str(model.source.folder), str(tmp_path / "out")]
    run = subprocess.run(program, capture_output=True, text=True)  # Orbax's other writers complain on stderr
    sentences = run.stdout.splitlines()
    assert len(sentences) == 3
    assert all("filled up, or a limit of it was reached" in sentence for sentence in sentences)
    assert left(tmp_path) == []


def test_a_disk_without_room_is_seen_before_any_work(tmp_path: Path):
    with pytest.raises(UserError, match=r"the disk of .* has .* free and out needs 1000000000\.0 GB"):
        check_output(tmp_path / "out", needed=10**18, inputs={})
    assert left(tmp_path) == []


def test_a_disk_that_renames_no_folder_with_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As a bucket that is mounted."""
    rename = Path.rename

    def refused(self: Path, target: Path) -> Path:
        if self.is_dir() and any(self.iterdir()):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(self))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(UserError, match=rf"out cannot be made in {tmp_path} \(Too many open files\)"):
        check_output(tmp_path / "out", inputs={})
    assert left(tmp_path) == []


def test_a_place_that_cannot_be_written(model: Model):
    with pytest.raises(UserError, match=r"/proc/out cannot be (made|written)"):
        save(model, "/proc/out")


KILLED = """
import os, signal, sys
from spap_jax.checkpoint import Writer, load
from spap_jax.checkpoint.inventory import array_dtypes
model = load(sys.argv[1])
dtypes = array_dtypes(model.params, model.config)
new, old = (Writer(name, model.config, model.source, dtypes, overwrite=True, shard_bytes=1) for name in sys.argv[2:])
with new, old:
    new.outer(model.params)
    old.outer(model.params)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_run_leaves_the_place_as_it_was(model: Model, tmp_path: Path):
    assert model.source.folder is not None
    save(model, tmp_path / "old")
    program = [sys.executable, "-c", KILLED, str(model.source.folder), str(tmp_path / "new"), str(tmp_path / "old")]
    assert subprocess.run(program, capture_output=True).returncode == -signal.SIGKILL
    *partial, old = left(tmp_path)
    assert [name.rpartition("-")[0] for name in partial] == [".new.partial", ".old.partial"]
    assert all("model-00001-of-00030.safetensors" in os.listdir(tmp_path / name) for name in partial)
    assert old == "old"
    for name in ("new", "old"):
        save(model, tmp_path / name, overwrite=True)
        assert raw_tensors(tmp_path / name) == raw_tensors(model.source.folder)


def test_what_is_written_is_checked(model: Model, tmp_path: Path):
    layer = jax.tree.map(lambda a: a[0], model.params["layers"])

    def write_pieces(*pieces) -> None:
        with Writer(tmp_path / "out", model.config, model.source, dtypes(model)) as writer:
            for piece in pieces:
                piece(writer)

    outer = lambda writer: writer.outer(model.params)  # noqa: E731
    layers = [lambda writer, i=i: writer.layer(i, layer) for i in range(4)]
    for pieces, sentence in (
        ((), "tensors were not written"),
        ((outer, *layers[:2]), "9 tensors were not written, such as model.layers.2"),
        ((outer, outer), "was written before"),
        ((outer, layers[3]), "is not a tensor of this model"),
        ((lambda writer: writer.file("../out.txt", ""),), "cannot be the name"),
        ((lambda writer: writer.file("config.json", ""),), "cannot be the name"),
        (
            (lambda writer: writer.layer(0, jax.tree.map(lambda a: a[:5], layer)),),
            r"\[5\], and the config gives \[32\]",
        ),
        ((lambda writer: writer.layer(0, jax.tree.map(lambda a: np.asarray(a, float), layer)),), "float64"),
    ):
        with pytest.raises(ValueError, match=sentence):
            write_pieces(*pieces)
    assert left(tmp_path) == []


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_not_written(value: float, model: Model, tmp_path: Path):
    params = model.params | {
        "head": {**model.params["head"], "weight": model.params["head"]["weight"].at[3, 4].set(value)}
    }
    with pytest.raises(UserError, match=r"lm_head\.weight became NaN or infinity"):
        save(Model(model.config, params, model.source), tmp_path / "out")


def test_weights_too_large_for_a_dtype(model: Model, tmp_path: Path):
    params = model.params | {
        "head": {**model.params["head"], "weight": model.params["head"]["weight"].at[3, 4].set(1e5)}
    }
    with pytest.raises(UserError, match=r"lm_head\.weight has values too large for float16: use bfloat16"):
        save(Model(model.config, params, model.source), tmp_path / "out", dtype="float16")
    with pytest.raises(UserError, match="no dtype 'int8' for weights: use one of float32, bfloat16, float16"):
        save(model, tmp_path / "out", dtype="int8")
    assert left(tmp_path) == []


def test_side_files_that_are_gone(tmp_path: Path):
    model = load(shutil.copytree(write("llama", tmp_path / "in"), tmp_path / "copy"))
    model = model.replace(params=jax.tree.map(np.array, model.params))
    shutil.rmtree(tmp_path / "copy")
    with pytest.warns(match=r"copy is gone, so that the result has no tokenizer or licence"):
        save(model, tmp_path / "out")
    assert left(tmp_path / "out") == ["config.json", "model.safetensors", "spap_files.json"]


def test_side_files(tmp_path: Path):
    folder = write("llama", tmp_path / "in")
    ours = {
        "tokenizer.model",
        "vocab.json",
        "merges.txt",
        "special_tokens_map.json",
        "added_tokens.json",
        "LICENSE.txt",
    }
    ours |= {"chat_template.jinja", "qwen.tiktoken", "spiece.model", "NOTICE", "USE_POLICY.md", "tokenizer_config.json"}
    ours |= {"additional_chat_templates/tool_use.jinja"}
    for name in ours | {"README.md", "pytorch_model.bin", "notes", "original/tokenizer.model", "tokenizer/vocab.json"}:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)
    model = load(folder)
    save(model, tmp_path / "out", files={"README.md": "new", "LICENSE.txt": "other"})
    always = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    copied = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*")}
    assert copied | {"NOTICE"} == ours | always | {"README.md", "spap_files.json"}
    assert (tmp_path / "out" / "NOTICE").read_text() == "NOTICE"
    assert (tmp_path / "out" / "README.md").read_text() == "new"
    assert (tmp_path / "out" / "LICENSE.txt").read_text() == "other"
