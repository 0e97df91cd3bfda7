"""Parallel efficiency from paired times on one device and on two."""

import pytest

from benchmarks.parallel import JOINT_STEP, SELECTION, STATISTICS, Measured, counted_efficiency, efficiencies


def test_efficiency_is_of_all_devices_together():
    pairs = [(Measured(2.0, 2.0), Measured(1.0, 2.5)), (Measured(2.0, 2.0), Measured(2.0, 2.0))]
    by_clock, by_processor = efficiencies(pairs)
    assert by_clock == [1.0, 0.5]
    assert by_processor == pytest.approx([0.8, 1.0])


def test_what_is_divided_is_counted_once():
    assert counted_efficiency(STATISTICS) == pytest.approx(1)
    assert counted_efficiency(SELECTION) == pytest.approx(1)
    assert counted_efficiency(JOINT_STEP) == pytest.approx(1)
