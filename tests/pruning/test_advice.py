"""The advice of a report when parts of a run brought no gain."""

import dataclasses
import json

import pytest

from spap_jax.pruning.achieved import Sparsities, Sparsity
from spap_jax.pruning.prune_report import Errors, LayerReport, PruneReport
from spap_jax.training.check import Check


def layer(index: int, held_out: float | None) -> LayerReport:
    errors = Errors(0.3, 0.2, 0.1)
    judged = None if held_out is None else dataclasses.replace(errors, alternating=held_out)
    return LayerReport(index, (0,), errors, judged, 0, 0, 1e-4, 1, {})


def report(
    sequences: int = 128,
    held_out: float | None = 0.12,
    taken: tuple[bool, ...] = (True, True, True, False),
    sampled: int = 0,
) -> PruneReport:
    """Return the report of a model with 1536 channels, calibrated on sequences of 128 tokens."""
    return PruneReport(
        settings={"sampled": sampled},
        method={"selection": "spap", "update": "alternate"},
        model={"intermediate": {"before": 1536, "after": 1075}},
        sparsity=Sparsities(Sparsity(0.3, 0.3), Sparsity(0.0, 0.0)),
        calibration={"sequences": sequences, "sequence_length": 128},
        versions={},
        layers=tuple(layer(index, held_out) for index in range(4)),
        joint=tuple(Check(index, 0, (), 0.2, each, 0.1) for index, each in enumerate((True, *taken))),
    )


STEPS = (
    "the joint steps were not taken, as predictions came no nearer to the dense model's; "
    "256 sequences would help (--sequences 256), and --effort low saves the time"
)
FEW = "the held-out error is 2.6 x the calibration's: 2 048 tokens are few for 1 536 channels; "


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, []),
        ({"held_out": 0.149}, []),
        ({"held_out": 0.26, "sequences": 16}, [f"{FEW}128 sequences would help (--sequences 128)"]),
        # --sequences does not count the sequences that the model samples.
        (
            {"held_out": 0.26, "sequences": 128, "sampled": 3},
            ["the held-out error is 2.6 x the calibration's; 128 sequences would help (--sequences 128)"],
        ),
        (
            {"held_out": 0.151},
            ["the held-out error is 1.5 x the calibration's; 256 sequences would help (--sequences 256)"],
        ),
        ({"held_out": None}, []),
        ({"held_out": float("nan")}, []),
        ({"taken": (False, False, True, True)}, []),
        ({"taken": (False, False, False, False)}, [STEPS]),
        ({"taken": ()}, []),
    ],
)
def test_advice(given: dict, expected: list[str]):
    made = report(**given)
    assert list(made.advice) == expected
    assert json.loads(made.to_json())["advice"] == expected
