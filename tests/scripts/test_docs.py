"""The pages build without warnings, and their links, command lines and file names are valid."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import spap_jax
from spap_jax.cli.app import app

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
FOLDERS = ("spap_jax", "tests", "benchmarks", "examples", "tpu_scripts")
PARTS = tuple(path.name for path in (ROOT / "spap_jax").iterdir() if path.is_dir())
ENTRANCES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "tpu_scripts/README.md")


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    build = Path(sys.executable).with_name("sphinx-build")
    words = [build, "--fail-on-warning", "--quiet", "--doctree-dir", folder / "trees", ROOT / "docs", folder / "html"]
    run = subprocess.run(words, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return folder / "html"


def text(page: Path) -> str:
    return re.sub(r"<[^>]+>", "", page.read_text("utf-8"))


def test_the_site_has_every_page(pages: Path):
    written = {path.relative_to(ROOT / "docs").with_suffix(".html") for path in (ROOT / "docs").rglob("*.md")}
    assert all((pages / path).exists() for path in written)
    index = (pages / "index.html").read_text("utf-8")
    assert all(f'href="{path.as_posix()}"' in index for path in written if path.name != "index.html")


def test_every_command_and_option_is_in_the_reference(pages: Path):
    shown = text(pages / "reference.html")
    commands = [name for name in app if not name.startswith("-")]
    assert {"prune", "eval", "bench", "report", "convert", "doctor"} <= set(commands)
    assert all(re.search(rf"^spap {name}( --| \[OPTIONS\]| [A-Z]|$)", shown, re.MULTILINE) for name in commands)
    assert "--data c4 --output" in shown  # as typed, not as typographic dashes
    assert all(f"--{field.replace('_', '-')}" in shown for field in spap_jax.PruneSettings.__annotations__)


def test_the_mathematics_is_set(pages: Path):
    page = (pages / "method.html").read_text("utf-8")
    assert page.count('<div class="math') >= 5
    assert "$$" not in page
    assert "mathjax" in page


def command_lines(file: Path) -> list[str]:
    """Return what is typed after ``spap`` in the code blocks of a page, and the commands that pods run."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", file.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    typed = (re.match(r"(?:\$ |srun |while )?spap (.+)|tpu_scripts/pod.sh .* -- (.+)", line) for line in lines)
    return [found[1] or found[2] for found in typed if found]


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_command_lines_are_found():
    assert sum(len(command_lines(page)) for page in PAGES) > 30


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_command_lines_are_understood(page: Path):
    """Commands and their options exist, and no required option is missing."""
    for line in command_lines(page):
        words = shlex.split(line.partition(";")[0], comments=True)
        words = [word for word in words if word not in ("...", "--version")]
        if "--config" in words:  # a launcher's option before the command; the file's options are unknown
            continue
        needed = {"prune": ["--data", "DATA"]} if "..." in line else {}
        app.parse_args([*words, *needed.get(words[0], [])], exit_on_error=False, print_error=False)


def test_every_public_name_is_in_the_reference(pages: Path):
    page = (pages / "reference.html").read_text("utf-8")
    names = [*spap_jax.__all__, *(f"solver.{name}" for name in spap_jax.solver.__all__)]
    assert [name for name in names if not re.search(rf'id="(module-)?spap_jax\.{re.escape(name)}"', page)] == []


def test_make_help_explains_every_target():
    named = re.search(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    said = subprocess.run(
        ["make", "--no-print-directory", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert named is not None
    assert re.findall(r"^make (\S+) +\w", said.stdout, re.MULTILINE) == named[1].split()


@pytest.mark.parametrize("entrance", ENTRANCES)
def test_links_on_a_code_host(entrance: str):
    """Check pages outside of ``docs/``, which Sphinx does not see."""
    file = ROOT / entrance
    places = [place for place in re.findall(r"\]\(([^)#]+)", file.read_text("utf-8")) if "://" not in place]
    assert [place for place in places if not (file.parent / place).exists()] == []


@pytest.mark.parametrize("page", [*ENTRANCES, *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_files_that_are_named_exist(page: str):
    """Check names in backticks, relative to the root or the package: tests behind a promise and its modules."""
    words = re.findall(r"`([\w./{},*-]+/[\w./-]+\.\w+)`", (ROOT / page).read_text("utf-8"))
    named = [word for word in words if word.split("/")[0] in {*FOLDERS, *PARTS}]
    assert [word for word in named if not any((place / word).exists() for place in (ROOT, ROOT / "spap_jax"))] == []


def test_the_page_on_security_names_a_test_for_every_promise():
    rows = re.findall(r"^\| .* \| (.*) \|$", (ROOT / "docs" / "security.md").read_text("utf-8"), re.MULTILINE)
    assert len(rows) >= 5
    assert all("`tests/" in row for row in rows if row not in ("test", "---"))
