"""The ways to prune that the table compares, and what is asked of ours."""

import dataclasses
import hashlib
import json
from typing import Any

import spap_jax as spap
from benchmarks.quality import ideas
from benchmarks.quality.ideas import IDEAS
from benchmarks.quality.results import Row
from spap_jax.baselines import update_used

_ALL_TOKENS: dict[str, Any] = {"held_out": 0.0}
"""Without steps nothing is judged on held-out sequences, so that all tokens are fitted."""

METHODS: dict[str, dict[str, Any]] = {
    **{
        name: {"method": name} | _ALL_TOKENS
        for name in ("random", "magnitude", "wanda", "flap", "fasp", "obs", "osscar")
    },
    "fasp + steps": {"method": "fasp", "update": "alternate"},
    "obs + steps": {"method": "obs", "update": "alternate"},
    "spap, refit only": {"update": "refit"} | _ALL_TOKENS,
    "spap, low effort": {"effort": "low"},
    "spap": {},
    "spap, high effort": {"effort": "high"},
    "wanda + refit": {"method": "wanda", "update": "refit"} | _ALL_TOKENS,
}
"""Settings by the name of a method."""

ALL = tuple(name for name in METHODS if name != "wanda + refit")
"""The methods of the whole table, in which ``fasp`` is Wanda's criterion with a refit."""

ASKED_AT: dict[str, tuple[float, ...]] = {
    "fasp + steps": (0.3,),
    "obs + steps": (0.3,),
    "spap, refit only": (0.3,),
    "spap, low effort": (0.3,),
    "spap, high effort": (0.2, 0.3),
}
"""The sparsities at which the whole table has a method, where it does not have it at all: those that it is asked of, or
one that shows what steps and efforts are worth. A call that names methods gets them wherever it asks."""

QUICK = ("wanda + refit", "spap, refit only", "spap")
"""The methods of the small table; the first is what the others are compared with."""

PEERS = tuple(name for name, settings in METHODS.items() if "method" in settings and "update" not in settings)
"""Methods as their papers have them: not our choice of channels, and their own update."""

STEPPED = tuple(name for name, settings in METHODS.items() if "method" in settings and "alternate" in settings.values())
"""Peers that are given the same steps on the weights as ours."""

TARGETS: dict[str, dict[float, float]] = {
    "spap": {0.1: 0.50, 0.2: 0.45, 0.3: 0.45, 0.5: 0.55},
    "spap, high effort": {0.2: 0.30, 0.3: 0.30},
}
"""Rise in log-perplexity by sparsity, as a fraction of the best peer's."""

QUICK_TARGET = 0.70
"""Rise in log-perplexity, ours over that of Wanda's criterion with a refit."""


def settings_of(method: str, sparsity: float, seed: int) -> spap.PruneSettings:
    """The settings of one run.

    Args:
        method: A key of `METHODS`, or one with settings of its own, such as "spap with sweeps=2 ridge=0.001"; among
            them may be an idea, which is no setting.
        sparsity: Fraction of channels to remove.
        seed: Of every random choice.

    Raises:
        UserError: the method or idea is unknown, or a setting is none or out of range.
    """
    name, changes = _parts(method)
    if name not in METHODS:
        raise spap.UserError(f"unknown method {name!r}; the methods are {'; '.join(METHODS)}.")
    idea = changes.pop("idea", None)
    if idea is not None and idea not in IDEAS:
        raise spap.UserError(f"unknown idea {idea!r}; the ideas are {', '.join(IDEAS)}.")
    settings = spap.PruneSettings().replace(sparsity=sparsity, seed=seed, **METHODS[name]).replace(**changes)
    if idea is not None:
        ideas.check(settings)
    return settings


def idea_of(method: str) -> str | None:
    """The key of `IDEAS` in a method such as "spap, low effort with idea=weighted"."""
    return _parts(method)[1].get("idea")


def _parts(method: str) -> tuple[str, dict[str, Any]]:
    name, _, changes = method.partition(" with ")
    return name, dict(_change(words) for words in changes.split())


def _change(words: str) -> tuple[str, Any]:
    """The setting and value of words such as ridge=0.001; what is no number is text."""
    name, _, value = words.partition("=")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


_NEWER: dict[str, Any] = {"stream_dtype": "float32"}
"""Settings that the first rows did not have yet, and the values that stand for what was done then."""


_OF_STEPS: dict[str, Any] = {
    "rounds": 2, "steps": 200, "learning_rate": 0.03, "step_tokens": 2048,
    "sweeps": 1, "sweep_blocks": 1, "sweep_steps": 150, "sweep_learning_rate": 0.015,
}  # fmt: skip
"""Settings that only steps on the weights read. Without steps they do not count: whatever they are, hashes have these
values, which were the defaults when the first rows were made."""


def settings_hash(settings: spap.PruneSettings) -> str:
    """Changes with every value that is used of what the settings hold or mean, also with a default."""
    values = dataclasses.asdict(settings) | settings.decided._asdict()
    values |= {} if update_used(settings) == "alternate" else _OF_STEPS
    text = json.dumps({k: v for k, v in values.items() if k not in _NEWER or v != _NEWER[k]}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def is_current(row: Row) -> bool:
    """Whether the row's method means today what it meant when the row was made."""
    try:
        return settings_hash(settings_of(row.method, row.sparsity, row.seed)) == row.settings
    except spap.UserError:  # of an earlier version
        return False
