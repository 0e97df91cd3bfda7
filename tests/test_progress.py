"""Progress: the lines of a run and the time left, from made-up times and reports."""

import io
import os
import sys
from collections.abc import Callable

import nbformat
import pytest
from nbclient import NotebookClient
from rich.console import Console

from spap_jax import progress
from spap_jax.progress import Pace, PruningProgress
from spap_jax.report.schema import AttentionReport, Check, Errors, LayerReport

ERRORS = Errors(0.0593, 0.0257, 0.0231)
ATTENTION = AttentionReport((0,), Errors(0.3, 0.2, 0.2), None, 0, 0, 1e-4)
LOOK = Check(step=25, tokens=100, losses=(2.0, 1.0), held_out=1.25, taken=True, seconds=0.1)


@pytest.fixture(autouse=True)
def _made_up_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "monotonic", lambda: Run.now)


def pace(*pieces: tuple[str, float, float]) -> Pace:
    """Return the pace after pieces of work, each with its kind, units and seconds."""
    known = Pace()
    for piece in pieces:
        known.add(*piece)
    return known


def test_the_first_piece_of_a_kind_is_not_counted_since_it_compiles():
    assert pace().left([("layer", 30)]) == ""
    assert pace(("layer", 1, 300)).left([("layer", 29)]) == ""
    assert pace(("layer", 1, 300), ("layer", 1, 80)).left([("layer", 28)]) == "about 37 min left"
    again = pace(("layer", 1, 50), ("layer", 1, 2))
    again.restart()
    again.add("layer", 1, 70)
    assert again.left([("layer", 5)]) == "about 10 s left"


def test_each_kind_has_its_own_pace_and_ends_the_estimate_where_it_has_none():
    known = pace(("layer", 1, 9), ("layer", 2, 4), ("perplexity", 1, 1), ("perplexity", 4, 20))
    assert known.left([("layer", 3), ("perplexity", 2)]) == "about 16 s left"
    assert known.left([("layer", 3), ("step", 7), ("perplexity", 2)]) == "step in 6 s"
    assert known.left([("layer", 0), ("perplexity", 2)]) == "about 10 s left"
    assert pace(("layer", 1, 0), ("layer", 1, 0.9)).left([("layer", 1)]) == ""


class Run:
    """A simulated pruning run of three layers and eight joint steps; ``now`` is the clock."""

    now = 0.0

    def __init__(self, **shape: int) -> None:
        Run.now, self.file = 0.0, io.StringIO()
        self.progress = PruningProgress(3, 8, **shape, console=Console(file=self.file))

    def layer(self, index: int, seconds: float, fresh: bool = True, **changes: object) -> str:
        values = {"kept": (0,), "calibration": ERRORS, "held_out": ERRORS, "swaps": 0, "improving_swaps": 0}
        values |= {"ridge": 1e-4, "rounds": 2, "seconds": {"streams": seconds / 4, "alternating": 3 * seconds / 4}}
        return self._after(seconds, fresh, LayerReport(index, **(values | changes)))  # type: ignore[arg-type]

    def steps(self, made: int, seconds: float, fresh: bool = True, taken: bool = True) -> str:
        return self._after(seconds, fresh, Check(made, 64 * made, (0.1,), 0.0498, taken, seconds, 0.75))

    def _after(self, seconds: float, fresh: bool, report: LayerReport | Check) -> str:
        Run.now += seconds if fresh else 0.01
        self.progress.report(report, fresh)
        return self.printed()

    def printed(self) -> str:
        """Return what was printed since the last time."""
        text = self.file.getvalue()
        self.file.truncate(0)
        self.file.seek(0)
        return text.strip()


def test_a_line_names_the_stages_that_changed_the_weights():
    start = "layer 1/3  held-out error: chosen 5.9 %"
    assert Run().layer(0, 81) == f"{start}, refit 2.6 %, adjusted 2.3 %  81 s"
    assert Run().layer(0, 81, held_out=Errors(0.0593, 0.0257, 0.0257)) == f"{start}, refit 2.6 %  81 s"
    assert Run().layer(0, 81, held_out=Errors(0.0593, 0.0593, 0.0593)) == f"{start}  81 s"
    assert Run().layer(0, 81, held_out=None, attention=ATTENTION).splitlines() == [
        "layer 1/3  attention, calibration error: chosen 30 %, refit 20 %",
        "layer 1/3  calibration error: chosen 5.9 %, refit 2.6 %, adjusted 2.3 %  81 s",
    ]


def test_the_time_left_covers_layers_steps_and_perplexity():
    run = Run(windows=10)
    for done in (2, 4):  # before pruning; the first two windows compile
        Run.now += done
        run.progress.measured(done, 4)
    assert run.layer(0, 100).endswith("  100 s")
    assert run.layer(1, 60).endswith("  60 s, step in 60 s")
    assert run.layer(2, 60).endswith("  60 s")
    assert run.steps(0, 9) == "step 0/8  held-out divergence 0.0498, same top token 75 %  9 s"
    assert run.steps(2, 70).endswith("  70 s")
    Run.now += 20
    run.progress.step(4, 8)  # four more at 10 s, and ten windows at 2 s
    assert run.printed() == "step 4/8, about 60 s left ..."
    said = "step 8/8  held-out divergence 0.0498, same top token 75 %"
    assert run.steps(8, 40, taken=False) == f"{said}, not kept  40 s, about 20 s left"


def test_what_an_earlier_process_made_counts_with_its_seconds():
    run = Run()
    assert run.layer(0, 300, fresh=False).endswith("adjusted 2.3 %  kept")
    run.layer(1, 60, fresh=False)
    assert run.layer(2, 100).endswith("  100 s")  # compiles again, and does not count
    assert run.steps(4, 1, fresh=False).endswith("  kept")


def test_several_runs_are_one_piece_of_work():
    run = Run(runs=2)
    lines = [run.layer(index, 60) for index in range(3)]
    assert lines[-1].endswith("  60 s")  # steps come next, whose pace is not known
    run.steps(4, 60)
    assert run.steps(8, 40).endswith("  40 s, about 4.3 min left")
    run.progress.begin(1)
    assert run.layer(0, 60).endswith("about 3.3 min left")


def test_how_far_some_work_is_without_a_terminal():
    """The work is named at once, and progress follows every ten seconds."""
    run = Run()
    with progress.counting(Console(file=run.file)) as watch:
        for done, seconds in ((0, 0), (10, 9), (20, 2), (30, 5), (40, 5), (100, 9)):
            Run.now += seconds
            watch("measuring", done, 100)
    expected = ["measuring ...", "measuring 20%, about 16 s left ...", "measuring 40%, about 24 s left ..."]
    assert run.printed().splitlines() == expected


def test_how_far_training_is():
    run = Run()
    with progress.training(100, console=Console(file=run.file)) as watch:
        for step, seconds in ((0, 60), (25, 90), (50, 30), (100, 40)):
            Run.now += seconds
            watch(Check(step, step, (2.0,) if step else (), 1.5, step < 100, 0.1))
    assert run.printed().splitlines() == [
        "step 0/100  held-out loss 1.5000",
        "step 25/100  loss 2.0000, held-out loss 1.5000",
        "step 50/100  loss 2.0000, held-out loss 1.5000, about 60 s left",
        "step 100/100  loss 2.0000, held-out loss 1.5000, not kept",
    ]


def test_a_terminal_has_bars_and_no_lines_between():
    run = Run()
    screen = Console(file=run.file, force_terminal=True, width=80)
    with progress.counting(screen) as watch:
        for done in (0, 50, 100):
            Run.now += 20
            watch("measuring", done, 100)
    printed = run.printed()
    assert "100/100" in printed
    assert "..." not in printed


@pytest.mark.parametrize("name", ["training", "pruning"])
def test_a_run_from_python_is_silent_unless_it_is_watched_or_asked(name: str, capsys: pytest.CaptureFixture[str]):
    reports: list[Check] = []
    choices: list[tuple[bool | Callable | None, int]] = [(None, 0), (False, 0), (True, 1), (reports.append, 0)]
    for choice, lines in choices:
        if name == "training":
            with progress.training(50, choice) as show:
                show(LOOK)
        else:
            with progress.pruning(choice, 3, 50) as listeners:
                listeners[0](LOOK)
                listeners[1](1, 50)
        assert capsys.readouterr().err.count("step 25/50") == lines
    assert reports == [LOOK]


def test_a_terminal_is_watched(monkeypatch: pytest.MonkeyPatch):
    assert not progress.is_watched()
    _, there = os.openpty()
    with open(there, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        assert progress.is_watched()


@pytest.mark.slow
def test_a_notebook_is_watched_and_shows_lines():
    """The lines go to standard error, as other progress bars do: they are no part of what a notebook computes."""
    cell = "from spap_jax import progress\nprogress.Display().print('layer 1/6')\nprint(progress.is_watched())"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell)])
    shown = NotebookClient(notebook).execute().cells[0].outputs
    assert {each.name: each.text for each in shown} == {"stderr": "layer 1/6\n", "stdout": "True\n"}
