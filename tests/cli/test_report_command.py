"""``spap report``: the files that it writes, and its refusals."""

from pathlib import Path

import pytest
from commands import QUICK, left, sentence, spap, succeed, tiny, token_file, without


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model and two pruned ones."""
    from spap_jax.cli import main

    folder = tmp_path_factory.mktemp("made")
    words = ["prune", tiny(folder / "dense"), "--data", token_file(folder / "ids.npy"), "--output", folder]
    assert main([str(word) for word in (*words, "--sparsity", "0.25,0.5", "--method", "fasp", *QUICK)]) == 0
    return folder


@pytest.fixture
def runs(made: Path) -> tuple[Path, Path]:
    return made / "sparsity-0.25", made / "sparsity-0.5"


def test_one_run(runs: tuple[Path, Path], tmp_path: Path, capsys):
    page = tmp_path / "new" / "page.html"
    words = ("report", runs[0], "--output", page)
    succeed(capsys, *words)
    assert left(page.parent) == ["page.html"]
    text = page.read_text()
    assert "<h1>dense, 24.5&nbsp;% of the MLP channels removed</h1>" in text
    assert "exists" in sentence(spap(capsys, *words))
    assert page.read_text() == text
    succeed(capsys, "report", runs[1], *words[2:], "--overwrite")
    assert page.read_text() != text


def test_several_runs_are_a_table(made: Path, runs: tuple[Path, Path], capsys):
    before = left(made)
    said = succeed(capsys, "report", *runs)
    assert all(name in said.out for name in ("sparsity-0.25", "sparsity-0.5"))
    assert spap(capsys, "report", made).out == said.out
    assert "name one" in sentence(spap(capsys, "report", *runs, "--output", made / "page.html"))
    assert left(made) == before


def test_nothing_is_written_when_something_is_wrong(runs: tuple[Path, Path], tmp_path: Path, capsys):
    words = ("report", runs[0], "--output", tmp_path / "page.html")
    assert "FOLDERS" in sentence(spap(capsys, "report"))
    assert "holds no spap_report.json" in sentence(spap(capsys, "report", tmp_path))
    assert "cannot be read" in sentence(spap(capsys, *words, "--bench", tmp_path / "none.json"))
    assert ".html" in sentence(spap(capsys, *words[:2], "--output", runs[0] / "model.safetensors", "--overwrite"))
    (tmp_path / "folder.html").mkdir()
    assert "exists" in sentence(spap(capsys, *words[:2], "--output", tmp_path / "folder.html", "--overwrite"))
    assert left(tmp_path) == ["folder.html"]
    assert "File name too long" in sentence(spap(capsys, *words[:2], "--output", tmp_path / ("x" * 300 + ".html")))


def test_without_its_library_it_says_what_to_install(runs: tuple[Path, Path], tmp_path: Path):
    said = sentence(without("matplotlib", "report", runs[0], "--output", tmp_path / "page.html"))
    assert said.startswith("spap report needs matplotlib")
    assert said.endswith("pip install 'spap-jax[report]'.")
    assert left(tmp_path) == []


def test_a_page_needs_no_jax(runs: tuple[Path, Path], tmp_path: Path):
    said = without("jax", "report", runs[0], "--output", tmp_path / "page.html")
    assert said.code == 0, said.err
    assert left(tmp_path) == ["page.html"]
