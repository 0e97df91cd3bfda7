"""The imports of every file follow the layer table of docs/architecture.md."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TABLE = re.findall(r"^\| (\d) \| (.+?) \|", (ROOT / "docs" / "architecture.md").read_text("utf-8"), re.MULTILINE)
SOURCES = sorted((ROOT / "spap_jax").rglob("*.py"))


def patterns() -> list[tuple[int, str]]:
    """Return (layer, path) from the table; a path is a file or a folder that ends in a slash; braces are expanded."""
    found = []
    for layer, cell in TABLE:
        for path in re.findall(r"`([^`]+)`", cell):
            spread = re.match(r"(.*)\{(.*)\}(.*)", path)
            names = [f"{spread[1]}{n}{spread[3]}" for n in spread[2].split(",")] if spread else [path]
            found += [(int(layer), name) for name in names]
    return found


def layer_of(path: str) -> int | None:
    matches = [(len(p), layer) for layer, p in patterns() if path == p or (p.endswith("/") and path.startswith(p))]
    return max(matches)[1] if matches else None


def imports(source: Path) -> set[str]:
    """Return the files of this project that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(source.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("spap_jax"):
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module or ""}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("spap_jax")}
    paths = set()
    for module in found:
        path = module.replace(".", "/")
        paths |= {p for p in (f"{path}.py", f"{path}/__init__.py") if (ROOT / p).exists()}
    return paths - {"spap_jax/__init__.py", "spap_jax/models/__init__.py"}


def relative(source: Path) -> str:
    return source.relative_to(ROOT).as_posix()


def test_the_table_is_read() -> None:
    assert len(patterns()) > 20
    assert layer_of("spap_jax/solver/problem.py") == 1
    assert "spap_jax/models/decoder.py" in imports(ROOT / "spap_jax" / "pruning" / "streams.py")


@pytest.mark.parametrize("source", SOURCES, ids=relative)
def test_a_file_imports_only_from_its_own_or_a_lower_layer(source: Path) -> None:
    mine = layer_of(relative(source))
    assert mine is not None, f"{relative(source)} is not in the table of docs/architecture.md"
    above = {path: layer_of(path) for path in imports(source) if (layer_of(path) or 0) > mine}
    assert not above


@pytest.mark.parametrize("path", [p for _, p in patterns()])
def test_the_table_names_what_exists(path: str) -> None:
    assert (ROOT / path).exists()


def test_models_know_no_checkpoint_and_the_solver_no_model() -> None:
    for source in SOURCES:
        if relative(source).startswith("spap_jax/models/"):
            known = {"spap_jax/errors.py"}
            if source.stem == "attention":  # it chooses a kernel for the platform, and gives each device its own heads
                known |= {f"spap_jax/{name}.py" for name in ("backend", "collectives", "devices")}
            if source.stem == "rules":  # it transposes the tensors of a checkpoint
                known |= {"spap_jax/host_arrays.py"}
            assert not {p for p in imports(source) if not p.startswith("spap_jax/models/")} - known
        if relative(source).startswith("spap_jax/solver/"):
            assert not {p for p in imports(source) if p.startswith("spap_jax/models/")}


def test_importing_the_package_starts_neither_jax_nor_transformers() -> None:
    heavy = "import sys, spap_jax; sys.exit(bool({'jax', 'transformers', 'torch', 'datasets'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", heavy]).returncode == 0
