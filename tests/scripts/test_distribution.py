"""The contents of the wheel and of the source archive; ``.ci/dist_check`` checks that the wheel works."""

import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import spap_jax

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
BESIDES = ("py.typed", "openings.jsonl", "templates/page.html")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout without links: the file system of Windows has small files with their targets instead."""
    folder = tmp_path_factory.mktemp("tree")
    listed = ["git", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, capture_output=True, text=True, check=True).stdout.split("\0")
    for source in (ROOT / name for name in names if name):
        copy = folder / source.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if source.is_symlink():
            copy.write_text(os.readlink(source))
        elif source.exists():
            shutil.copy(source, copy)
    return folder


@pytest.fixture(scope="module")
def built(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source archive, and with the wheel that is built from the unpacked archive."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, tree]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PIP_NO_INDEX": "1"})
    assert run.returncode == 0, run.stderr
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> zipfile.ZipFile:
    return zipfile.ZipFile(next(built.glob("*.whl")))


@pytest.fixture(scope="module")
def archive(built: Path) -> set[str]:
    with tarfile.open(next(built.glob("*.tar.gz"))) as file:
        return {name.partition("/")[2] for name in file.getnames() if not name.endswith(".egg-info")}


def test_the_wheel_holds_every_module_and_nothing_else(tree: Path, wheel: zipfile.ZipFile):
    kept = (path.relative_to(tree).as_posix() for path in (tree / "spap_jax").rglob("*"))
    modules = {path for path in kept if path.endswith((".py", *BESIDES))}
    found = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert found == modules
    assert all(any(name.endswith(each) for name in found) for each in BESIDES)


def test_the_wheel_says_what_it_is(wheel: zipfile.ZipFile):
    info = f"spap_jax-{spap_jax.__version__}.dist-info"
    told = email.message_from_bytes(wheel.read(f"{info}/METADATA"))
    assert told["Version"] == spap_jax.__version__
    assert told["License-Expression"] == "Apache-2.0"
    core = " ".join(each for each in told.get_all("Requires-Dist", []) if "extra ==" not in each)
    assert "torch" not in core
    assert "jinja2" in core, "without it, transformers renders no conversation"
    assert wheel.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    assert "spap = spap_jax.cli:main" in wheel.read(f"{info}/entry_points.txt").decode()


def test_the_archive_is_the_checkout(tree: Path, archive: set[str]):
    checkout = {path.relative_to(tree).as_posix() for path in tree.rglob("*") if path.is_file()}
    made = {name for name in checkout if name.startswith(("build/", "spap_jax.egg-info/"))}  # by the build
    assert checkout - made - {"models"} <= archive
    assert not {name for name in archive if name.startswith((".venv", "build/", "dist/", "out/", "examples/out/"))}


def test_the_first_cell_of_the_notebooks_brings_the_example_to_colab(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The package is installed already, as after pip; its source archive comes from a folder instead of the index."""
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": str(built), "NO_BUILD_ISOLATION": "0"}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    notebooks = (nbformat.read(path, as_version=4).cells for path in (ROOT / "examples").glob("*.ipynb"))
    sources = (next(cell.source for cell in cells if cell.cell_type == "code") for cells in notebooks)
    first = {source.replace("report", "torch") for source in sources}
    assert len(first) == 1  # the same in all notebooks, apart from the extra
    pretend = 'import sys, types\nsys.modules["google.colab"] = types.ModuleType("colab")'
    cells = [nbformat.v4.new_code_cell(source) for source in (pretend, *first)]
    NotebookClient(nbformat.v4.new_notebook(cells=cells), resources={"metadata": {"path": str(tmp_path)}}).execute()
    for name in ("llama-stories/model.safetensors", "stories_calibration.txt", "stories_evaluation.txt"):
        assert (tmp_path / name).stat().st_size > 0


def test_an_editable_install_finds_the_packages_in_the_checkout(tree: Path, tmp_path: Path):
    build = f"from setuptools.build_meta import build_editable; build_editable({str(tmp_path)!r})"
    run = subprocess.run([sys.executable, "-c", build], cwd=tree, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    zipfile.ZipFile(next(tmp_path.glob("*.whl"))).extractall(tmp_path)
    # Without importing it, since it needs JAX, which this interpreter does not find.
    find = f"import site; site.addsitedir({str(tmp_path)!r}); from importlib.util import find_spec; "
    find += "print(find_spec('spap_jax.models').origin)"
    run = subprocess.run([sys.executable, "-I", "-S", "-c", find], capture_output=True, text=True)
    assert run.stdout.strip() == str(tree / "spap_jax" / "models" / "__init__.py"), run.stderr


def test_the_folder_of_the_models_is_a_link_at_the_top():
    """A clone without links has a small file instead, which nothing needs."""
    link = ROOT / "models"
    named = os.readlink(link) if link.is_symlink() else link.read_text("utf-8")
    assert named == "spap_jax/models"


def test_the_version_is_the_same_everywhere():
    written = re.findall(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text("utf-8"), re.MULTILINE)
    assert written == [spap_jax.__version__]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert project["dynamic"] == ["version"]
