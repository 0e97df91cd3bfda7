"""Where numbers come from: the commit of the code, and the command."""

import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]

CODE = ("spap_jax", "models", "benchmarks", "pyproject.toml")
"""What makes the numbers; a change elsewhere, as in the results themselves, leaves them as they are."""


def commit(root: Path = ROOT) -> str:
    """The checkout's commit, "-dirty" behind it where the code differs from it; "unknown" outside of one."""
    try:
        name = _git(root, "rev-parse", "--short=12", "HEAD")
        return name + ("-dirty" if _git(root, "status", "--porcelain", "--", *CODE) else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(root: Path, *words: str) -> str:
    run = subprocess.run(["git", "-C", str(root), *words], check=True, capture_output=True, text=True)
    return run.stdout.strip()


def command(words: Sequence[str]) -> str:
    """The command of these words, as it can be published: of paths from elsewhere only the last name is left."""
    return shlex.join(["python", "-m", "benchmarks.quality", *(_shortened(word) for word in words)])


def _shortened(word: str) -> str:
    path = Path(word)
    if not path.is_absolute():
        return word
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else path.name
