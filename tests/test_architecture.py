"""Imports run downwards through the packages, and no two packages import each other."""

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def package_of(path: Path) -> str:
    """Return the package of a file below spap_jax, or the name of a file directly in it."""
    return path.relative_to(ROOT / "spap_jax").parts[0].removesuffix(".py")


def imported(source: Path) -> set[Path]:
    """Return the files of this project that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("spap_jax"):
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module or ""}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names if alias.name.startswith("spap_jax")}
    places = [ROOT / name.replace(".", "/") for name in names]
    files = [file for place in places for file in (place.with_suffix(".py"), place / "__init__.py") if file.exists()]
    return set(files) - {ROOT / "spap_jax" / "__init__.py"}


def test_no_two_packages_import_each_other() -> None:
    edges = {
        (package_of(source), package_of(file))
        for source in (ROOT / "spap_jax").rglob("*.py")
        for file in imported(source)
    }
    assert len(edges) > 50
    assert not {(a, b) for a, b in edges if a < b and (b, a) in edges}


def test_models_and_solver_know_nothing_of_checkpoints_and_runs() -> None:
    low = {"models", "solver", "parallel", "errors", "settings", "numerics", "backend", "quantities"}
    for package in ("models", "solver"):
        for source in (ROOT / "spap_jax" / package).rglob("*.py"):
            assert {package_of(file) for file in imported(source)} <= low, source


def test_importing_the_package_starts_neither_jax_nor_transformers() -> None:
    heavy = "import sys, spap_jax; sys.exit(bool({'jax', 'transformers', 'torch', 'datasets'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", heavy]).returncode == 0


def test_python_users_are_not_given_flags() -> None:
    """``errors.option`` spells an option for who is listening."""
    for source in (ROOT / "spap_jax").rglob("*.py"):
        if package_of(source) in ("cli", "errors"):
            continue
        tree = ast.parse(source.read_text("utf-8"))
        texts = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}  # docstrings
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in texts:
                flag = re.search(r"(?<!\w)--[a-z]", node.value)
                a_command = "spap " in node.value or node.value == "--overwrite"
                assert not flag or a_command, f"{source}:{node.lineno}"
