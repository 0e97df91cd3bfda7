"""Helpers for command-line tests: input folders, running commands, and checks of their output."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hf_models import VARIANTS, hf_model

from spap_jax.checkpoint import states
from spap_jax.checkpoint.store import FolderStore, Json
from spap_jax.cli import main

EXAMPLES = Path(__file__).parents[2] / "examples"
STORIES = EXAMPLES / "llama-stories"
CALIBRATION, EVALUATION = EXAMPLES / "stories_calibration.txt", EXAMPLES / "stories_evaluation.txt"
TEMPLATE = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
QUICK = ("--sequences", "16", "--sequence-length", "64", "--joint-passes", "0")


class Said(NamedTuple):
    """Attributes: code: exit code; out and err: text on standard output and standard error."""

    code: int
    out: str
    err: str


def spap(capsys: pytest.CaptureFixture[str], *words: object) -> Said:
    """Runs a command in this process."""
    capsys.readouterr()
    code = main([str(word) for word in words])
    said = capsys.readouterr()
    return Said(code, said.out, said.err)


SAVING = """
import sys
from spap_jax.checkpoint import states
from spap_jax.cli import main
states.SECONDS = 0
sys.exit(main())
"""
"""A program that runs a command and saves the state of steps at every check."""


def process(*words: object, saving: bool = False, **settings: str) -> subprocess.Popen[str]:
    """Starts a command in another process; the state of its steps may be saved at every check."""
    program = ["-c", SAVING] if saving else ["-m", "spap_jax"]
    command = [sys.executable, *program, *map(str, words)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=os.environ | settings)


def apart(*words: object, **settings: str) -> Said:
    """Runs a command in another process."""
    run = process(*words, saving=False, **settings)
    out, err = run.communicate()
    return Said(run.returncode, out, err)


def interrupt(capsys: pytest.CaptureFixture[str], kept: tuple[str, object], *words: object, time: int = 1) -> Said:
    """Runs a command in this process, and interrupts it once it has kept a report with a field for that many times."""
    left_over = iter(range(time - 1))

    def then_interrupting(function: Callable[..., Any], report_of: Callable[..., Json]) -> Callable[..., Any]:
        def called(kept_in: FolderStore, *arguments: Any) -> Any:
            result = function(kept_in, *arguments)
            if kept in report_of(*arguments).items() and next(left_over, None) is None:
                raise KeyboardInterrupt
            return result

        return called

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(states, "SECONDS", 0)
        put, save_state = FolderStore.put, FolderStore.save_state
        patched.setattr(FolderStore, "put", then_interrupting(put, lambda index, layer, report: report))
        patched.setattr(FolderStore, "save_state", then_interrupting(save_state, lambda tree, checks: checks[-1]))
        said = spap(capsys, *words)
    assert said.code == 130, said
    return said


def sentence(said: Said) -> str:
    """Returns the sentence of a refusal: exit code 2, and one line that begins with `spap:`, last on standard error.

    Progress lines and warnings may precede it.
    """
    assert said.code == 2, said
    assert said.out == ""
    lines = said.err.splitlines()
    assert lines[-1].startswith("spap: ")
    assert all(line.endswith(" ...") or line.startswith("spap: warning: ") for line in lines[:-1]), said.err
    return lines[-1].removeprefix("spap: ")


def tiny(folder: Path, variant: str = "llama", **changes: object) -> Path:
    """Writes a tiny checkpoint, with the given fields changed in its config.json."""
    hf_model(variant).save_pretrained(folder)
    written = VARIANTS[variant] | {"architectures": [type(hf_model(variant)).__name__]} | changes
    (folder / "config.json").write_text(json.dumps(written))
    return folder


def token_file(path: Path, top: int = 97, sequences: int = 16, length: int = 64) -> Path:
    np.save(path, np.random.default_rng(0).integers(0, top, (sequences, length)))
    return path


def left(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())
