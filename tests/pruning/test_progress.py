"""Progress lines of a run and estimates of the time left, from made-up times and reports."""

import dataclasses
from collections.abc import Sequence

import pytest
from pruning_cases import tiny

from spap_jax.pruning.progress import Progress, Said
from spap_jax.report.schema import AttentionReport, Check, Errors, LayerReport
from spap_jax.settings import PruneSettings

LLAMA = tiny("llama").config  # three layers
ERRORS = Errors(0.0593, 0.0257, 0.0231)
LOW = PruneSettings(joint_passes=0)
JOINT = PruneSettings(joint_passes=2, joint_tokens=64)  # 15 sequences, 4 in a step: 8 steps


class Watch:
    """A fake clock that advances only when a test changes ``now``."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Run:
    """A simulated run with some settings, and the progress that it reports.

    Attributes:
        progress: The object under test.
        watch: Its clock.
    """

    def __init__(self, *settings: PruneSettings, judged: int = 0, layers: int = 3) -> None:
        self.watch = Watch()
        self.progress = Progress(dataclasses.replace(LLAMA, layers=layers), settings, (16, 16), judged, self.watch)

    def layer(self, index: int, seconds: float, fresh: bool = True, **changes) -> Said:
        self.watch.now += seconds if fresh else 0.01
        return self.progress.step(layer(index, seconds, **changes), fresh)

    def steps(self, made: int, seconds: float, fresh: bool = True, taken: bool = True) -> Said:
        self.watch.now += seconds if fresh else 0.01
        return self.progress.step(Check(made, 64 * made, (0.1,), 0.0498, taken, seconds), fresh)


def layer(index: int, seconds: float = 1.0, **changes) -> LayerReport:
    whole = {"kept": (0,), "calibration": ERRORS, "held_out": ERRORS, "swaps": 0, "improving_swaps": 0}
    whole |= {"ridge": 1e-4, "rounds": 2, "seconds": {"streams": seconds / 4, "alternating": 3 * seconds / 4}}
    return LayerReport(layer=index, **(whole | changes))


def left(said: Said) -> str:
    """Return the time left as the bar shows it, which the last line has to end with."""
    assert said.lines[-1].endswith(said.left)
    return said.left


ATTENTION = AttentionReport((0,), Errors(0.3, 0.2, 0.2), None, 0, 0, 1e-4)
START = "layer 1/3  held-out error: chosen 5.9 %"


@pytest.mark.parametrize(
    ("settings", "changes", "lines"),
    [
        (LOW, {}, [f"{START}, refit 2.6 %, adjusted 2.3 %  81 s"]),
        (LOW, {"rounds": 0}, [f"{START}, refit 2.6 %, no further gain  81 s"]),
        (LOW.replace(rounds=0), {"rounds": 0}, [f"{START}, refit 2.6 %  81 s"]),
        (LOW.replace(method="obs"), {"rounds": 0}, [f"{START}, refit 2.6 %  81 s"]),
        (LOW.replace(method="flap"), {"rounds": 0}, [f"{START}, with a bias 2.6 %  81 s"]),
        (LOW.replace(method="wanda"), {"rounds": 0}, [f"{START}  81 s"]),
        (
            LOW,
            {"held_out": None, "calibration": Errors(1.2, 0.123, 0.00123)},
            ["layer 1/3  calibration error: chosen 120.0 %, refit 12.3 %, adjusted 0.12 %  81 s"],
        ),
        (
            LOW,
            {"attention": ATTENTION},
            [
                "layer 1/3  attention, calibration error: chosen 30.0 %, refit 20.0 %",
                f"{START}, refit 2.6 %, adjusted 2.3 %  81 s",
            ],
        ),
    ],
)
def test_a_layer_in_words(settings: PruneSettings, changes: dict, lines: list[str]):
    assert list(Run(settings).layer(0, 81, **changes).lines) == lines


@pytest.mark.parametrize("until", ["about 50 min left", "step in 50 min"])
def test_a_line_fits_a_hundred_columns(until: str):
    run = Run(JOINT if "step" in until else LOW)
    run.layer(0, 10)
    said = run.layer(1, 3000, held_out=Errors(0.356, 0.327, 0.322), rounds=0)
    assert said.lines[0].endswith(until)
    assert len(said.lines[0].replace("2/3", "22/30")) <= 100


def test_the_time_left_of_the_layers():
    """The first layer compiles, so it gives no estimate; after the last one nothing is left."""
    run = Run(LOW)
    assert [left(run.layer(*each)) for each in ((0, 600), (1, 80), (2, 90))] == ["", "about 80 s left", ""]


def test_joint_steps_are_in_the_time_left_once_they_are_measured():
    """The first step compiles."""
    run = Run(JOINT)
    assert [left(run.layer(*each)) for each in ((0, 60), (1, 8), (2, 8))] == ["", "step in 8 s", ""]
    said = run.steps(0, 1)
    assert (said.phase, said.done, said.total, said.left) == ("step", 0, 8, "")
    assert said.lines == ("step 0/8  held-out loss 0.0498  1 s",)
    run.watch.now += 30
    assert run.progress.part(1, 8).left == ""
    run.watch.now += 5
    assert run.progress.part(2, 8).lines == ("step 2/8, about 30 s left ...",)
    said = run.steps(2, 1, taken=False)
    assert said.lines == ("step 2/8  held-out loss 0.0498, not kept  1 s, about 30 s left",)
    assert (said.phase, said.done, said.total) == ("step", 2, 8)


def test_after_an_interruption_the_steps_that_are_kept_tell_the_pace():
    """Kept steps count with the seconds they once took; what this process compiles does not count."""
    run = Run(LOW, layers=6)
    kept = [run.layer(index, seconds, fresh=False) for index, seconds in enumerate((600, 80, 100))]
    assert [said.lines[0].rpartition("  ")[2] for said in kept] == ["kept"] * 3
    assert kept[2].left == "about 4.5 min left"
    assert left(run.layer(3, 700)) == "about 3 min left"
    assert left(run.layer(4, 60)) == "about 80 s left"


def test_after_an_interruption_in_the_joint_steps():
    run = Run(JOINT)
    kept = [run.layer(index, seconds, fresh=False) for index, seconds in enumerate((60, 8, 8))]
    kept += [run.steps(made, seconds, fresh=False) for made, seconds in ((0, 1), (2, 500), (4, 20))]
    assert [said.left for said in kept] == ["", "step in 8 s", "", "", "", "about 40 s left"]


def perplexity(run: Run, seconds: Sequence[float]) -> None:
    """Measure perplexity window by window, each in the given seconds."""
    run.progress.measured(0, len(seconds))
    for done, each in enumerate(seconds):
        run.watch.now += each
        run.progress.measured(done + 1, len(seconds))


def test_perplexity_and_later_runs_are_in_the_time_left():
    run = Run(LOW, LOW.replace(sparsity=0.5), judged=4)
    perplexity(run, [30, 2, 2, 2])
    said = run.progress.begin(0)
    assert (said.phase, said.done, said.left) == ("1 of 2, layer", 0, "")
    run.layer(0, 100)
    first = left(run.layer(1, 10))
    assert first.startswith("about ")
    assert float(first.split()[1]) == 10 + 8 + 30 + 8
    run.layer(2, 10)
    perplexity(run, [2, 2, 2, 2])
    assert run.progress.begin(1).phase == "2 of 2, layer"
    assert left(run.layer(0, 100)).startswith("about ")
    run.layer(1, 5)
    assert left(run.layer(2, 5)) == "about 8 s left"


def test_a_run_that_was_made_before_is_not_in_the_time_left():
    run = Run(LOW, LOW)
    run.progress.begin(1)
    run.layer(0, 100)
    assert left(run.layer(1, 10)) == "about 10 s left"


def test_layers_of_different_widths_and_sampled_sequences_are_counted():
    settings = PruneSettings(allocation="global", sampled=1)
    widths = LLAMA.with_widths([37, 30, 37])
    assert Progress(widths, [settings], (32, 16)).begin(0).total == 3
