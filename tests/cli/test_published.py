"""What may be published: no written file contains a path of this machine, and no other file is uploaded."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import left, spap, tiny, token_file

from spap_jax.checkpoint.publish import files_of, left_out
from spap_jax.data.sources import data_name
from spap_jax.storage.location import public_name

SHORT = ("--sequences", "16", "--sequence-length", "32")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, data, and the outputs of all commands on them."""
    from spap_jax.cli import main

    work = tmp_path_factory.mktemp("private")
    dense, ids = tiny(work / "dense"), token_file(work / "ids.npy")
    (dense / "generation_config.json").write_text('{"eos_token_id": 1}')
    pruned, trained, orbax = work / "pruned", work / "trained", work / "orbax"
    commands = (
        ("prune", dense, "--data", ids, "--eval", ids, "--output", pruned, "--method", "wanda", *SHORT),
        ("finetune", pruned, "--teacher", dense, "--data", ids, "--eval", ids, "--output", trained, "--steps", "2",
         *SHORT),
        ("convert", trained, "--to", "orbax", "--output", orbax),
        ("convert", orbax, "--to", "huggingface", "--output", work / "back"),
        ("eval", pruned, "--data", ids, "--sequence-length", "32", "--json", work / "eval.json"),
        ("bench", dense, pruned, "--prompt", "8", "--new", "2", "--repeats", "1", "--json", work / "bench.json"),
        ("report", pruned, "--bench", work / "bench.json"),
        ("report", trained),
    )  # fmt: skip
    for words in commands:
        assert main([str(word) for word in words]) == 0
    return work


def texts(folder: Path) -> Iterator[tuple[str, str]]:
    """Yields the text files, by their names relative to the folder."""
    for file in folder.rglob("*"):
        if file.is_file():
            try:
                yield file.relative_to(folder).as_posix(), file.read_bytes().decode()
            except UnicodeDecodeError:
                continue


def test_no_file_holds_a_path(work: Path) -> None:
    found = dict(texts(work))
    reports = {"pruned/spap_report.json", "trained/spap_finetune.json", "pruned/README.md", "trained/README.md"}
    assert reports | {"orbax/spap_source.json", "eval.json", "bench.json", "pruned/spap_report.html"} < found.keys()
    assert [name for name, text in found.items() if str(work) in text] == []


def test_names_are_told(work: Path) -> None:
    found = {name: json.loads(text) for name, text in texts(work) if name.endswith(".json")}
    pruned, trained = found["pruned/spap_report.json"], found["trained/spap_finetune.json"]
    assert pruned["model"]["name"] == "dense"
    assert pruned["calibration"]["description"] == "ids.npy: 16 of 32 windows of 32 tokens, seed 0"
    assert pruned["extras"]["perplexity"]["data"] == "ids.npy: 32 of 32 windows of 32 tokens"
    assert (trained["model"], trained["teacher"]) == ("pruned", "dense")
    assert (found["eval.json"]["model"], found["eval.json"]["data"]) == ("pruned", "ids.npy")
    assert [model["model"] for model in found["bench.json"]["models"]] == ["dense", "pruned"]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("hf://owner/model", "owner/model"),
        ("gs://bucket/models/dense", "dense"),
        ("/home/someone/models/dense/", "dense"),
        ("models/dense", "dense"),  # a folder here, though it looks like a hub id
        ("models/dense/..", "models"),
    ],
)
def test_the_name_of_a_model(name: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "dense").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert public_name(name) == told


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ("c4:/data/c4-train.json.gz", "c4:c4-train.json.gz"),
        ("owner/set:config", "owner/set:config"),
        ("/home/someone/text.txt", "text.txt"),
        (Path("folder/ids.npy"), "ids.npy"),
    ],
)
def test_the_name_of_data(data: str | Path, told: str) -> None:
    assert data_name(data) == told


def test_there_and_back_every_file_is_the_same(work: Path) -> None:
    """The round trip covers card and reports, tokenizer and generation settings, config and weights."""
    before, after = ({name: (work / each / name).read_bytes() for name in left(work / each)} for each in
                     ("trained", "back"))  # fmt: skip
    pages = {name for name in before if name.startswith("spap_report") and not name.endswith(".json")}
    assert pages
    assert after == {name: content for name, content in before.items() if name not in pages}
    assert {"README.md", "spap_report.json", "spap_finetune.json", "generation_config.json"} < after.keys()


@pytest.mark.parametrize("kind", ["trained", "orbax"])
def test_what_is_sent_is_what_was_written(kind: str, work: Path) -> None:
    folder = work / kind
    strays = ("notes.md", ".secret", ".git/HEAD", "old/config.json", "LICENSE.mine", "spap_reports.txt")
    for name in strays:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("mine")
    files, page = files_of(folder), {"spap_report.html"}
    there = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    assert files.keys() == there - page - {*strays, "spap_files.json"}
    named = left_out(folder, files)
    assert {"notes.md", ".secret", ".git/", "old/", "LICENSE.mine", "spap_reports.txt"} == set(named) - page
    assert "spap_files.json" not in named
    if kind == "trained":
        assert page <= set(named)
        assert files_of(folder, with_page=True).keys() == files.keys() | page


def test_push_names_what_it_leaves_out(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It does so before it asks the hub, which here cannot be reached."""
    for name in ("notes [draft].md", "spap_report.html"):
        (work / "pruned" / name).write_text("mine")
    said = spap(capsys, "push", work / "pruned", "owner/name")
    assert "leaving out notes [draft].md, spap_report.html: not files of the checkpoint; --with-report" in said.err
    said = spap(capsys, "push", work / "pruned", "owner/name", "--with-report")
    assert "leaving out notes [draft].md: not files of the checkpoint" in said.err
