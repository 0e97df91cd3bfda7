"""For any output name, no file that the command did not write changes, and no file appears."""

import os
import shutil
from pathlib import Path

import pytest
import stores
from commands import Said, left, sentence, spap, succeed, tiny, token_file
from trees import hashes

from spap_jax import checkpoint
from spap_jax.storage.files import Folder

SMALL = ("--sequences", "16", "--sequence-length", "16")
WORDS = {
    "prune": ("prune", "v/base/dense", "--data", "data/ids.npy", "--method", "magnitude", *SMALL),
    "finetune": ("finetune", "v/base/dense", "--data", "data/ids.npy", "--steps", "1", *SMALL),
    "convert": ("convert", "v/base/dense", "--to", "huggingface"),
    "orbax": ("convert", "v/base/dense", "--to", "orbax"),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model inside a checkpoint that this program wrote, and data."""
    folder = tmp_path_factory.mktemp("made")
    checkpoint.save(checkpoint.load(tiny(folder / "dense")), folder / "v" / "base")
    (folder / "dense").rename(folder / "v" / "base" / "dense")
    (folder / "data").mkdir()
    token_file(folder / "data" / "ids.npy")
    return folder


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of the commands, with a copy of those files and links to it."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    (tmp_path / "link").symlink_to("v/base/dense")
    (tmp_path / "around").symlink_to("v")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("command", WORDS)
def test_an_output_that_touches_what_is_read(command: str, here: Path, capsys):
    """Other spellings of these places are tried in tests/checkpoint."""
    before = hashes(here)
    for output in ("link", "around", "v/base/dense/new", *(("data",) if command in ("prune", "finetune") else ())):
        said = sentence(spap(capsys, *WORDS[command], "--output", output, "--overwrite"))
        assert f"the output {output} " in said
        assert hashes(here) == before


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((*WORDS["finetune"], "--teacher", "./t/dense", "--output", "t"), "contains the teacher ./t/dense"),
        ((*WORDS["prune"], "--eval", "c4:e/text.txt", "--output", "e"), "contains the evaluation data e/text.txt"),
        ((*WORDS["prune"], "--eval", "file:///e/text.txt", "--output", "/e"), "data file:///e/text.txt"),
        (("prune", "./in", "--data", "d/a.txt:0.25,e/b.txt:0.75", "--output", "e"), "contains the data (part 2)"),
        (("prune", "gs://b/in", "--data", "wikitext2", "--output", "gcs://b//in/"), "is the model gs://b/in"),
        (("prune", "./in", "--data", "c4:s3://b/x/text.txt", "--output", "s3://b/x"), "contains the data s3://"),
    ],
)  # fmt: skip
def test_every_input_counts_and_addresses_too(words: tuple[str, ...], expected: str, here: Path, capsys):
    """Inputs are compared by name only: they do not exist, and there is no network."""
    before = hashes(here)
    assert expected in sentence(spap(capsys, *words))
    assert hashes(here) == before


def test_several_sparsities_beside_files_of_others(here: Path, capsys):
    """The other files stay unchanged; each output is checked on its own."""
    (here / "out").mkdir()
    (here / "out" / "notes.txt").write_text("dear")
    before = hashes(here)
    words = (*WORDS["prune"], "--output", "out", "--overwrite", "--sparsity")
    succeed(capsys, *words, "0.25,0.5")
    assert left(here / "out") == ["notes.txt", "sparsity-0.25", "sparsity-0.5"]
    succeed(capsys, *words, "0.25,0.5")
    (here / "out" / "sparsity-0.5" / "notes.txt").write_text("dear")
    after = hashes(here)
    assert "sparsity-0.5 is not overwritten, because it holds files" in sentence(spap(capsys, *words, "0.25,0.5"))
    assert hashes(here) == after
    assert before.items() <= after.items()
    assert "has no name" in sentence(spap(capsys, *WORDS["prune"], "--output", "", "--sparsity", "0.25,0.5"))
    said = sentence(spap(capsys, *WORDS["prune"][:1], "out", *words[2:], "0.25,0.5"))
    assert "lies inside the model out" in said
    assert hashes(here) == after


@pytest.mark.parametrize("command", WORDS)
def test_files_of_others_in_the_output(command: str, here: Path, capsys):
    """The foreign file is a hard link to the run's calibration file, and the error text is the command line's own."""
    out = here / "v" / "base"
    (here / "v" / "base" / "dense").rename(here / "dense")
    words = [{"v/base/dense": "dense"}.get(word, word) for word in WORDS[command]]
    os.link(here / "data" / "ids.npy", out / "ids.npy")
    before = hashes(here)
    assert "exists" in sentence(spap(capsys, *words, "--output", "v/base"))
    assert "ids.npy" in sentence(spap(capsys, *words, "--output", "v/base", "--overwrite"))
    assert hashes(here) == before


def test_an_orbax_folder_at_an_address(here: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    stores.begin()
    monkeypatch.setenv("SPAP_CACHE", str(here / "cache"))

    def converted(output: str, *more: str) -> Said:
        return spap(capsys, *WORDS["orbax"], "--output", output, *more)

    before = hashes(here)
    assert "is the model" in sentence(converted(f"file://{here}/v/base/dense", "--overwrite"))
    assert "contains the model" in sentence(converted(f"file://{here}/v/base", "--overwrite"))
    assert hashes(here) == before
    assert converted("frail://bucket/out").code == 0
    assert "exists" in sentence(converted("frail://bucket/out"))
    assert converted("frail://bucket/out", "--overwrite").code == 0
    Folder("frail://bucket/out").write("notes.txt", b"dear")
    there = stores.contents("/bucket")
    assert "notes.txt" in sentence(converted("frail://bucket/out", "--overwrite"))
    assert stores.contents("/bucket") == there
