"""The progress display of runs started from Python: what is shown, and when."""

import os
import sys

import nbformat
import pytest
from nbclient import NotebookClient

from spap_jax import watching
from spap_jax.report.schema import Check

LOOK = Check(step=25, tokens=100, losses=(2.0, 1.0), held_out=1.25, taken=True, seconds=0.1)


def test_training_is_silent_unless_it_is_watched_or_asked(capsys: pytest.CaptureFixture[str]):
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
