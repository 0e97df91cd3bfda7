"""The advice of a report when parts of a run brought no gain."""

from dataclasses import replace

import pytest
from reports import written

from spap_jax.report.advice import advice
from spap_jax.report.schema import Change, Check, DataAccount, Errors, LayerReport, PruneReport


def layer(index: int, held_out: float | None) -> LayerReport:
    errors = Errors(0.3, 0.2, 0.1)
    judged = None if held_out is None else replace(errors, alternating=held_out)
    return LayerReport(index, (0,), errors, judged, 0, 0, 1e-4, 1, {})


def report(
    sequences: int = 128,
    held_out: float | None = 0.12,
    taken: tuple[bool, ...] = (True, True, True, False),
    further: int = 0,
) -> PruneReport:
    """Return the report of a model with 1536 channels, calibrated on sequences of 128 tokens."""
    any_run = written(layers=4)
    return replace(
        any_run,
        model=replace(any_run.model, intermediate=Change(1536, 1075)),
        calibration=DataAccount(sequences, 128, "some text", None, further),
        layers=tuple(layer(index, held_out) for index in range(4)),
        joint=tuple(Check(index, 0, (), 0.2, each, 0.1) for index, each in enumerate((True, *taken))),
    )


STEPS = (
    "the joint steps were not taken, as predictions came no nearer to the dense model's; "
    "256 sequences would help, and joint_passes=0 saves the time"
)
FEW = "the held-out error is 2.6 x the calibration's: 2 048 tokens are few for 1 536 channels; "


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, []),
        ({"held_out": 0.149}, []),
        ({"held_out": 0.26, "sequences": 16}, [f"{FEW}128 sequences would help"]),
        # `sequences` does not count the sequences that the model samples.
        (
            {"held_out": 0.151},
            ["the held-out error is 1.5 x the calibration's; 256 sequences would help"],
        ),
        # Joint steps have read further sequences of the text, in place of these again.
        (
            {"held_out": 0.151, "further": 360},
            ["the held-out error is 1.5 x the calibration's; 1 024 sequences would help"],
        ),
        ({"held_out": None}, []),
        ({"held_out": float("nan")}, []),
        ({"taken": (False, False, True, True)}, []),
        ({"taken": (False, False, False, False)}, [STEPS]),
        ({"taken": ()}, []),
    ],
)
def test_advice(given: dict, expected: list[str]):
    assert list(advice(report(**given))) == expected
