"""The picture of a run: who was where, and for how long."""

from pathlib import Path

import pytest

from benchmarks import way
from spap_jax import quantities
from spap_jax.report import tables


def test_rooms() -> None:
    assert way.room_of(str(way.SOURCE / "pruning" / "layer.py")) == "pruning/layer.py"
    assert way.room_of(str(way.SOURCE / "solver" / "swap.py")) == "solver"
    assert way.room_of(quantities.__file__) is way.room_of(str(Path(__file__))) is None


def test_helpers_count_for_whoever_calls_them() -> None:
    with way.following() as found:
        tables.value_text(None)
        tables.differing([{"a": 1}, {"a": 2}])  # calls value_text, which calls json
        quantities.count_text(1000)
    assert list(found.spans) == ["reporting"]
    assert len(found.spans["reporting"]) == 2


def test_stays_are_joined_and_passing_calls_left_out() -> None:
    spans = [(0.0, 0.5), (0.51, 1.0), (2.0, 2.0001), (3.0, 3.01)]
    assert way.stays(spans, 0.1) == [(0.0, 1.0), (3.0, pytest.approx(0.1))]
