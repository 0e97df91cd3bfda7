"""What the benchmarks share: the methods that are compared, files of rows, tables in Markdown, and provenance."""

import json
import shlex
import subprocess
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec

import spap_jax as spap

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"

_ALL_TOKENS: dict[str, Any] = {"held_out": 0.0}
"""Without steps nothing is evaluated on held-out sequences, so all tokens are used for fitting."""

PEERS = ("random", "magnitude", "wanda", "flap", "fasp", "obs", "osscar")
"""Methods as in their papers: with their own channel selection and their own update."""

METHODS: dict[str, dict[str, Any]] = {
    **{name: {"method": name} | _ALL_TOKENS for name in PEERS},
    "fasp + steps": {"method": "fasp", "update": "alternate"},
    "obs + steps": {"method": "obs", "update": "alternate"},
    "spap, refit only": {"update": "refit"} | _ALL_TOKENS,
    "spap, low effort": {"effort": "low"},
    "spap": {},
    "spap, high effort": {"effort": "high"},
}
"""Settings of each method, by name."""

Row = TypeVar("Row", bound=msgspec.Struct)


def settings_of(method: str, sparsity: float, seed: int) -> spap.PruneSettings:
    """Returns the settings of a run.

    Args:
        method: A key of `METHODS`, or one with changed settings, for example "spap with rounds=3 round_to=8".
        sparsity: Fraction of channels to remove.
        seed: Seed of every random choice.

    Raises:
        UserError: the method is unknown, or a setting is unknown or out of range.
    """
    name, _, changes = method.partition(" with ")
    if name not in METHODS:
        raise spap.UserError(f"there is no method {name!r}: name some of {', '.join(map(repr, METHODS))}.")
    changed = {key: _value(text) for key, _, text in (word.partition("=") for word in changes.split())}
    return spap.PruneSettings().replace(sparsity=sparsity, seed=seed, **METHODS[name]).replace(**changed)


def _value(text: str) -> Any:
    """Parses a setting; what is not JSON is text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def rows_in(file: Path, kind: type[Row]) -> list[Row]:
    """Returns the rows of a file, a line of JSON each; none if there is no file."""
    lines = file.read_bytes().splitlines() if file.exists() else []
    return [msgspec.json.decode(line, type=kind) for line in lines]


def store(file: Path, rows: Iterable[msgspec.Struct]) -> None:
    """Writes a file of rows, which it replaces whole: it holds hours of work."""
    file.parent.mkdir(parents=True, exist_ok=True)
    written = file.with_name(f"{file.name}.new")
    written.write_bytes(b"".join(msgspec.json.encode(row) + b"\n" for row in rows))
    written.replace(file)


def table(head: Sequence[str], lines: Iterable[Sequence[str]], words: Collection[str] = ()) -> str:
    """Formats a table: the first column and those named in ``words`` hold text, aligned left, the others numbers."""
    rule = ["---" if name in (head[0], *words) else "---:" for name in head]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *lines))


def commit() -> str:
    """Returns the commit of the code, followed by "-dirty" if the code differs; "unknown" outside a checkout."""
    try:
        changed = _git("status", "--porcelain", "--", "spap_jax", "benchmarks", "pyproject.toml")
        return _git("rev-parse", "--short=12", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*words: str) -> str:
    run = subprocess.run(["git", "-C", str(ROOT), *words], check=True, capture_output=True, text=True)
    return run.stdout.strip()


def command(module: str, words: Sequence[str]) -> str:
    """Returns a module's command line in publishable form: of absolute paths only the last name is left."""
    short = (Path(word).name if Path(word).is_absolute() else word for word in words)
    return shlex.join(["python", "-m", module, *short])
