"""Provenance of the numbers: the commit of the code, and the command."""

import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]

CODE = ("spap_jax", "benchmarks", "pyproject.toml")
"""Paths that affect the numbers; changes elsewhere, for example in the results themselves, do not."""


def commit(root: Path = ROOT) -> str:
    """Returns the checkout's commit, followed by "-dirty" if the code differs from it; "unknown" outside a checkout."""
    try:
        name = _git(root, "rev-parse", "--short=12", "HEAD")
        return name + ("-dirty" if _git(root, "status", "--porcelain", "--", *CODE) else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(root: Path, *words: str) -> str:
    run = subprocess.run(["git", "-C", str(root), *words], check=True, capture_output=True, text=True)
    return run.stdout.strip()


def command(words: Sequence[str], module: str = "benchmarks.quality") -> str:
    """Returns a module's command line in publishable form: of paths outside the checkout only the last name is left."""
    return shlex.join(["python", "-m", module, *(_shortened(word) for word in words)])


def _shortened(word: str) -> str:
    path = Path(word)
    if not path.is_absolute():
        return word
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else path.name
