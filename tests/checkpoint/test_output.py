"""An output folder is complete or absent, and replaces nothing that this program did not write."""

import contextlib
import errno
import os
import resource
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_checkpoints import raw_tensors, write
from trees import hashes

from spap_jax.checkpoint import check_output, load, save, save_orbax
from spap_jax.checkpoint.folders import LocalFolder
from spap_jax.errors import NotFiniteError, UserError
from spap_jax.models.model import Model

SAVE = [save, save_orbax]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load(write("llama", tmp_path_factory.mktemp("source") / "in"))


@pytest.fixture
def out(model: Model, tmp_path: Path) -> Path:
    """A checkpoint that this program wrote."""
    save(model, tmp_path / "out", files={"card.md": "one"})
    return tmp_path / "out"


def left(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


@contextlib.contextmanager
def short_files(limit: int) -> Iterator[None]:
    """Limits the file size, so that an error occurs midway although the free space on the disk looked sufficient."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_folder_that_cannot_be_synced(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some network file systems sync files only; a disk that fails is another matter."""
    sync = os.fsync

    def failing(code: int) -> Callable[[int], None]:
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
    assert left(tmp_path) == ["out"]


@pytest.mark.parametrize("write_it", SAVE)
def test_overwrite_replaces_the_whole_folder(write_it: Callable[..., None], model: Model, out: Path) -> None:
    before = hashes(out)
    with pytest.raises(UserError, match="exists"):
        write_it(model, out)
    assert hashes(out) == before
    write_it(model, out, overwrite=True)
    assert not (out / "card.md").exists()
    write_it(model, out, overwrite=True)
    assert left(out.parent) == ["out"]


def test_a_file_that_is_renamed_while_a_folder_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, walk = LocalFolder(tmp_path), os.walk
    for name in ("one", "two.new"):
        folder.write(name, b"123")

    def walk_then_rename(*arguments: Any, **options: Any) -> Iterator[Any]:
        for found in walk(*arguments, **options):
            (tmp_path / "two.new").rename(tmp_path / "two")
            yield found

    monkeypatch.setattr(os, "walk", walk_then_rename)
    assert folder.sizes() == {"one": 3}


def test_an_empty_folder_is_filled_and_a_file_is_not_replaced(model: Model, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    save(model, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "config.json").exists()
    (tmp_path / "file").write_text("x")
    for place in ("file", "file/out"):
        with pytest.raises(UserError, match="name another place"):
            save(model, tmp_path / place, overwrite=True)
    assert left(tmp_path) == ["file", "link", "real"]


def test_a_disk_that_fills_up(model: Model, tmp_path: Path) -> None:
    with short_files(3000), pytest.raises(UserError, match="filled up"):
        save(model, tmp_path / "out")
    with pytest.raises(UserError, match="1e\\+06 TB"):
        check_output(tmp_path / "out", needed=10**18, inputs={})
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


@pytest.mark.slow
def test_a_disk_that_fills_up_while_orbax_writes(model: Model, tmp_path: Path) -> None:
    program = [sys.executable, "-c", FULL, str(model.source.folder), str(tmp_path / "out")]
    run = subprocess.run(program, capture_output=True, text=True)  # Orbax's other writers complain on stderr
    assert run.stdout.count("filled up") == 3
    assert left(tmp_path) == []


def test_a_path_that_orbax_takes_for_a_pattern(model: Model, tmp_path: Path) -> None:
    (tmp_path / "a[x]").mkdir()
    with pytest.raises(UserError, match="brackets"):
        save_orbax(model, tmp_path / "a[x]" / "out")
    assert left(tmp_path / "a[x]") == []


@pytest.mark.parametrize("value", [np.nan, 1e5])
def test_weights_that_are_not_finite_in_the_dtype(value: float, model: Model, tmp_path: Path) -> None:
    head = jnp.asarray(model.params["head"]["weight"]).at[3, 4].set(value)
    params = model.params | {"head": {**model.params["head"], "weight": head}}
    with pytest.raises(NotFiniteError, match=r"lm_head\.weight"):
        save(Model(model.config, params, model.source), tmp_path / "out", dtype="float16")
    with pytest.raises(UserError, match="int8"):
        save(model, tmp_path / "out", dtype="int8")
    assert left(tmp_path) == []


def test_side_files_that_are_gone(tmp_path: Path) -> None:
    model = load(shutil.copytree(write("llama", tmp_path / "in"), tmp_path / "copy"))
    model = model.replace(params=jax.tree.map(np.array, model.params))
    shutil.rmtree(tmp_path / "copy")
    with pytest.warns(match=r"copy is gone, so that the result has no tokenizer or licence"):
        save(model, tmp_path / "out")
    assert left(tmp_path / "out") == ["config.json", "model.safetensors", "spap_files.json"]


def test_side_files(tmp_path: Path) -> None:
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


# What others wrote


def a_repository(out: Path) -> None:
    (out / ".git" / "refs").mkdir(parents=True)
    (out / ".git" / "HEAD").write_text("ref: refs/heads/main")


def a_link_in_place_of_the_weights(out: Path) -> None:
    weights = (out / "model.safetensors").rename(out.parent / "moved")
    (out / "model.safetensors").symlink_to(weights)


ADDED: list[tuple[Callable[[Path], object], str]] = [
    (lambda out: (out / "scores.json").write_text('{"written_by": "spap eval"}'), r"scores\.json"),
    (lambda out: (out / ".hidden").write_text(""), r"\.hidden"),
    (a_repository, r"\.git/HEAD"),
    (lambda out: (out / "card.md").write_text("my own words"), r"card\.md"),
    (lambda out: (out / "folder").symlink_to(out.parent), "folder"),
    (lambda out: os.mkfifo(out / "pipe"), "pipe"),
    (a_link_in_place_of_the_weights, r"model\.safetensors"),
    (lambda out: (out / "spap_files.json").unlink(), r"card\.md, config\.json"),
    (lambda out: (out / "spap_files.json").write_text("[]"), r"card\.md, config\.json"),
]


@pytest.mark.parametrize(("add", "named"), ADDED)
def test_what_others_put_there_is_never_lost(
    add: Callable[[Path], object], named: str, model: Model, out: Path, tmp_path: Path
) -> None:
    add(out)
    before = hashes(tmp_path)
    for write_it in SAVE:
        with pytest.raises(UserError, match=named):
            write_it(model, out, overwrite=True)
    assert hashes(tmp_path) == before


def test_a_file_that_is_gone_is_no_obstacle(model: Model, out: Path, tmp_path: Path) -> None:
    (out / "generation_config.json").unlink()
    shutil.copytree(out, tmp_path / "copy")
    save(model, tmp_path / "copy", overwrite=True)
    assert raw_tensors(tmp_path / "copy") == raw_tensors(out)


@pytest.mark.parametrize("place", ["in", "in/new/deep", ".", "link", "link/new", "IN/../in/"])
def test_a_model_is_not_saved_over_or_into_or_around_its_source(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(write("llama", tmp_path / "in"))
    (tmp_path / "link").symlink_to("in")
    (tmp_path / "IN").mkdir()
    before = hashes(tmp_path)
    monkeypatch.chdir(tmp_path)
    for write_it in SAVE:
        with pytest.raises(UserError, match="the model"):
            write_it(model, place, overwrite=True)
    assert hashes(tmp_path) == before


@pytest.mark.parametrize(
    "output",
    ["", "/", "..", "/proc/foo", "x" * 250, "file/out", "loop",
     " ", "gs://bucket/a/../b", "gs://bucket/run*", "gs://bucket", "hf://owner/name", "HF://owner/name"],
)  # fmt: skip
def test_names_that_no_output_can_have(
    output: str, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here" / "sub").mkdir(parents=True)
    (tmp_path / "here" / "file").write_text("dear")
    (tmp_path / "here" / "loop").symlink_to("loop")
    monkeypatch.chdir(tmp_path / "here")
    before = hashes(tmp_path)
    with pytest.raises(UserError):
        save(model, output, overwrite=True)
    assert hashes(tmp_path) == before
