"""The progress display of runs started from Python: what is shown, and when."""

import os
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient

import spap_jax as spap
from spap_jax import watching
from spap_jax.reporting.schema import Check

STORIES = Path(__file__).parents[1] / "examples" / "llama-stories"
LOOK = Check(step=25, tokens=100, losses=(2.0, 1.0), held_out=1.25, taken=True, seconds=0.1)


def test_pruning_is_silent_unless_it_is_watched_or_asked(capsys: pytest.CaptureFixture[str]):
    model, tokens = spap.load(STORIES), np.random.default_rng(0).integers(0, 512, (4, 32))
    seen = []
    for progress, lines in ((None, 0), (False, 0), (True, 6), (seen.append, 0)):
        capsys.readouterr()
        result = spap.prune(model, tokens, progress=progress, method="magnitude")
        said = capsys.readouterr()
        assert said.out == ""
        assert [line.partition("  ")[0] for line in said.err.splitlines() if line.startswith("layer ")] == [
            f"layer {number}/6" for number in range(1, lines + 1)
        ]
        assert bool(said.err) == bool(lines)
    assert [report.layer for report in seen] == [report.layer for report in result.report.layers]


def test_training_too(capsys: pytest.CaptureFixture[str]):
    seen = []
    for progress, steps in ((None, []), (False, []), (True, ["step 25/50"]), (seen.append, [])):
        with watching.training(50, progress) as show:
            show(LOOK)
        assert [line.partition("  ")[0] for line in capsys.readouterr().err.splitlines()] == steps
    assert seen == [LOOK]


def test_a_terminal_is_watched(monkeypatch: pytest.MonkeyPatch):
    assert not watching.watched()
    _, there = os.openpty()
    with open(there, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        assert watching.watched()


def test_a_notebook_is_watched_and_shows_lines():
    """The lines go to standard error, as other progress bars do: they are no part of what a notebook computes."""
    cell = "from spap_jax import watching\nfrom spap_jax.cli import console\nconsole.err.print('layer 1/6')\n"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell + "print(watching.watched())")])
    shown = NotebookClient(notebook).execute().cells[0].outputs
    assert {each.name: each.text for each in shown} == {"stderr": "layer 1/6\n", "stdout": "True\n"}
