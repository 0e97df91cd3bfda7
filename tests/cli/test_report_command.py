"""``spap report``: the files that it writes, and its refusals."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from commands import QUICK, left, sentence, spap, tiny, token_file


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
    said = spap(capsys, "report", runs[0], "--output", page)
    assert said.code == 0
    assert said.err.splitlines()[-1] == f"wrote {page} and 4 plots in {page.parent}"
    names = [f"page-{name}.png" for name in ("channels", "errors", "gains", "seconds")]
    assert left(page.parent) == [*names, "page.html"]
    text = page.read_text()
    assert "<h1>dense, 24.5&nbsp;% of the MLP channels removed</h1>" in text
    before = (page.stat().st_mtime_ns, text)
    assert "page.html exists: name another place, or pass --overwrite" in sentence(
        spap(capsys, "report", runs[0], "--output", page)
    )
    assert (page.stat().st_mtime_ns, page.read_text()) == before
    assert spap(capsys, "report", runs[1], "--output", page, "--overwrite").code == 0
    assert page.read_text() != text


def test_several_runs_and_their_speed(made: Path, runs: tuple[Path, Path], tmp_path: Path, capsys):
    bench = tmp_path / "bench.json"
    words = ("--prompt", "16", "--new", "4", "--repeats", "1", "--json", bench)
    assert spap(capsys, "bench", made / "dense", runs[1], *words).code == 0
    said = spap(capsys, "report", *runs, "--png", tmp_path / "plots", "--bench", bench)
    assert said.code == 0
    page = made / "spap_report.html"  # in the folder that contains both
    assert said.err.splitlines()[-1] == f"wrote {page} and 12 plots in {tmp_path / 'plots'}"
    assert left(made) == ["dense", "ids.npy", "spap_report.html", *(run.name for run in runs)]
    assert {"spap_report-1-sparsity-0.25-errors.png", "spap_report-compare-decode.png"} <= set(left(tmp_path / "plots"))
    found = json.loads(bench.read_text())["speed_up"]
    assert all(f"<td>{found[phase]:.3f}x</td>" in page.read_text() for phase in ("prefill", "decode"))


def test_the_folder_of_several_sparsities(made: Path, runs: tuple[Path, Path], tmp_path: Path, capsys):
    pages = [tmp_path / "folder.html", tmp_path / "runs.html"]
    for page, words in zip(pages, ((made,), runs), strict=True):
        assert spap(capsys, "report", *words, "--output", page).code == 0
    assert pages[0].read_text() == pages[1].read_text()


def test_nothing_is_written_when_something_is_wrong(runs: tuple[Path, Path], tmp_path: Path, capsys):
    words = ("report", runs[0], "--output", tmp_path / "page.html")
    assert sentence(spap(capsys, "report")) == 'Command "report" parameter FOLDERS requires an argument.'
    assert "holds no spap_report.json" in sentence(spap(capsys, *words, tmp_path))
    assert "are the same folder" in sentence(spap(capsys, *words, runs[0]))
    assert "cannot be read" in sentence(spap(capsys, *words, "--bench", tmp_path / "none.json"))
    assert left(tmp_path) == []
    (tmp_path / "page-errors.png").touch()
    assert "page-errors.png exists" in sentence(spap(capsys, *words))
    assert left(tmp_path) == ["page-errors.png"]
    assert "is a folder: name a file" in sentence(spap(capsys, *words[:2], "--output", tmp_path))
    assert "File name too long" in sentence(spap(capsys, *words[:2], "--output", tmp_path / ("x" * 300)))


def in_a_process(program: str, *words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", program, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True)


def test_without_its_library_it_says_what_to_install(runs: tuple[Path, Path], tmp_path: Path):
    program = (
        "import sys\nsys.modules['matplotlib'] = None\nfrom spap_jax.cli import main\nsys.exit(main(sys.argv[1:]))"
    )
    done = in_a_process(program, "report", runs[0], "--output", tmp_path / "page.html")
    assert done.returncode == 2
    assert done.stderr == (
        "spap: spap report needs matplotlib, which is not installed: install it with pip install 'spap-jax[report]'.\n"
    )
    assert left(tmp_path) == []


def test_a_page_needs_no_jax(runs: tuple[Path, Path], tmp_path: Path):
    program = "import sys\nfrom spap_jax.cli import main\nsys.exit(main(sys.argv[1:]) or 'jax' in sys.modules)"
    done = in_a_process(program, "report", runs[0], "--output", tmp_path / "page.html")
    assert done.returncode == 0, done.stderr
    assert "page.html" in left(tmp_path)
