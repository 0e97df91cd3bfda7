"""Settings hold plain Python numbers: booleans are refused as numbers, and NumPy's scalars are converted."""

import dataclasses
import json
import math
import re
from typing import Any

import numpy as np
import pytest

from spap_jax import FinetuneSettings, PruneSettings, UserError

FIELDS = [
    (kind, field.name)
    for kind in (PruneSettings, FinetuneSettings)
    for field in dataclasses.fields(kind)
    if field.name != "full"
]


@pytest.mark.parametrize(("kind", "name"), FIELDS)
@pytest.mark.parametrize("value", [True, False])
def test_a_truth_value_is_no_number(kind: type, name: str, value: bool):
    with pytest.raises(UserError, match=f"^{name} must be .*, not {value}"):
        kind(**{name: value})


@pytest.mark.parametrize(
    ("name", "words", "inside", "outside"),
    [
        ("seed", "a whole number of at least 0", (0, 2**32 - 1), (-1, 0.5, None)),
        ("step_tokens", "a whole number of at least 1", (1,), (0, 1.0, None)),
        ("joint_blocks", "a whole number of at least 0", (None, 0), (-1,)),
        ("penalty", "positive", (1e-3, 1), (0, -1, math.inf, math.nan, None, "1")),
        ("joint_passes", "at least 0", (None, 0, 0.5), (-0.1, math.inf)),
        ("correction", "between 0 and 1", (None, 0, 1), (-0.1, 1.1, math.nan)),
        ("held_out", "a fraction of at least 0 and below 1", (0, 0.9), (-0.1, 1, math.nan)),
        ("sparsity", "a fraction between 0 and 1, both excluded", (0.01, 0.99), (0, 1, math.nan)),
        ("effort", "one of low, default, high", ("low",), ("best", None)),
        ("remat", "one of full, dots", (None, "dots"), ("none",)),
    ],
)
def test_the_ends_of_each_range(name: str, words: str, inside: tuple[Any, ...], outside: tuple[Any, ...]):
    for value in inside:
        assert getattr(PruneSettings(**{name: value}), name) == value
    for value in outside:
        with pytest.raises(UserError, match=re.escape(f"{name} must be {words}, not {value!r}")):
            PruneSettings(**{name: value})


def test_a_fraction_is_no_count():
    with pytest.raises(UserError, match=r"steps must be a whole number of at least 1, not 8\.0"):
        PruneSettings(steps=8.0)  # type: ignore[arg-type]


def test_numbers_of_numpy():
    settings = PruneSettings(sparsity=np.float32(0.25), round_to=np.int64(64))  # type: ignore[arg-type]
    assert settings == PruneSettings(sparsity=0.25, round_to=64)
    assert json.loads(json.dumps(dataclasses.asdict(settings)))["round_to"] == 64


def test_what_depends_on_the_model_or_the_text_is_resolved():
    """Rounds are passes over the text, and the joint rate falls with what moves; what is given stays."""
    low = PruneSettings(effort="low").resolved(layers=6, width=96, channels=320, tokens=65_536)
    assert (low.steps, low.joint_passes, low.joint_last, low.joint_tokens) == (16, 1, 3, 512)
    assert (low.joint_text_weight, PruneSettings().text_weight) == (0.7, 0.3)
    assert low.joint_learning_rate == 0.004
    large = PruneSettings(effort="low").resolved(30, 576, 1536, 65_536)
    assert large.joint_learning_rate == pytest.approx(0.12 / (24 * 3 ** (2 / 3)))
    assert PruneSettings().resolved(6, 96, 320, 65_536).joint_learning_rate == pytest.approx(5.8 / 576)
    assert PruneSettings(step_tokens=1024).resolved(30, 576, 1536, 65_536).steps == 128
    assert (low.remat, PruneSettings().resolved(6, 96, 320, 65_536).remat) == ("dots", "full")
    assert PruneSettings(effort="low", remat="full").resolved(6, 96, 320, 65_536).remat == "full"
    given = PruneSettings(steps=7, joint_passes=1.5, joint_learning_rate=0.1)
    assert given.resolved(30, 576, 1536, 65_536) == given.replace(
        round_to=8,
        sampled=0,
        ridge=1e-2,
        correction=0.5,
        joint_last=30,
        joint_tokens=2048,
        joint_text_weight=0.3,
        remat="full",
    )


@pytest.mark.parametrize(
    ("changes", "weight"),
    [
        ({"sparsity": 0.5, "effort": "low"}, 0.7),
        ({"sparsity": 0.15, "effort": "low"}, 0.35),
        ({"sparsity": 0.06, "attention_sparsity": 0.15, "effort": "low"}, 0.35),
        ({"sparsity": 0.15}, 0.3),
        ({"sparsity": 0.06, "effort": "high"}, 0.14),
        ({"sparsity": 0.06, "joint_text_weight": 0.5}, 0.5),
    ],
)
def test_the_text_weighs_less_where_less_is_removed(changes: dict[str, Any], weight: float):
    assert PruneSettings(**changes).text_weight == pytest.approx(weight)


def test_wide_mlps_keep_a_multiple_of_8():
    found = [PruneSettings().multiple(channels) for channels in (320, 1023, 1024, 8191, 8192, 53248)]
    assert found == [1, 1, 8, 8, 64, 64]
    assert PruneSettings(round_to=5).multiple(4096) == 5


def test_the_update_decides_how_closely_weights_are_fitted():
    ours, peers = (1e-2, 0.5), (1e-4, 1.0)
    assert PruneSettings().fit == PruneSettings(method="obs", update="alternate").fit == ours
    assert PruneSettings(method="obs").fit == PruneSettings(update="refit").fit == peers
    assert PruneSettings(ridge=0.1, correction=0.0).fit == (0.1, 0.0)
