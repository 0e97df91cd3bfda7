"""Settings hold plain Python numbers: booleans are refused as numbers, and NumPy's scalars are converted."""

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest

from spap_jax import FinetuneSettings, PruneSettings, UserError, WriteSettings

FIELDS = [
    (kind, field.name)
    for kind in (PruneSettings, FinetuneSettings, WriteSettings)
    for field in dataclasses.fields(kind)
    if field.name != "full"
]


@pytest.mark.parametrize(("kind", "name"), FIELDS)
def test_a_truth_value_is_no_number(kind: type, name: str):
    with pytest.raises(UserError, match=name):
        kind(**{name: True})


@pytest.mark.parametrize(
    ("name", "inside", "outside"),
    [
        ("seed", (0, 2**32 - 1), (-1, 2**32, 0.5, None)),
        ("batch_tokens", (1,), (0, 1.0, 2**31)),
        ("joint_last", (None, 1), (0, -1)),
        ("joint_passes", (None, 0, 0.5), (-0.1, math.inf, math.nan)),
        ("joint_text_weight", (0, 1), (-0.1, 1.1, math.nan, None)),
        ("held_out", (0, 0.9), (-0.1, 1, math.nan)),
        ("sparsity", (0, 0.99), (-0.1, 1, math.nan, "0.3")),
        ("effort", ("low",), ("best", None)),
    ],
)
def test_the_ends_of_each_range(name: str, inside: tuple[Any, ...], outside: tuple[Any, ...]):
    for value in inside:
        assert getattr(PruneSettings(**{name: value}), name) == value
    for value in outside:
        with pytest.raises(UserError, match=f"{name} must be"):
            PruneSettings(**{name: value})


def test_all_that_is_wrong_is_said():
    with pytest.raises(UserError, match=r"effort .*; joint_passes "):
        PruneSettings(effort="full", joint_passes=-1)  # type: ignore[arg-type]


def test_numbers_of_numpy():
    settings = PruneSettings(sparsity=np.float32(0.25), round_to=np.int64(64))  # type: ignore[arg-type]
    assert settings == PruneSettings(sparsity=0.25, round_to=64)
    assert json.loads(json.dumps(dataclasses.asdict(settings)))["round_to"] == 64
