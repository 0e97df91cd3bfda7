"""The pruning methods that the table compares, and the targets for ours."""

import dataclasses
import hashlib
import json
from typing import Any

import spap_jax as spap
from benchmarks.quality.results import Row
from spap_jax.solver.methods import update_used

_ALL_TOKENS: dict[str, Any] = {"held_out": 0.0}
"""Without steps nothing is evaluated on held-out sequences, so all tokens are used for fitting."""

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
"""Settings of each method, by name."""

ALL = tuple(name for name in METHODS if name != "wanda + refit")
"""The methods of the full table, in which ``fasp`` is Wanda's criterion with a refit."""

ASKED_AT: dict[str, tuple[float, ...]] = {
    "fasp + steps": (0.3,),
    "obs + steps": (0.3,),
    "spap, refit only": (0.3,),
    "spap, low effort": (0.3,),
    "spap, high effort": (0.2, 0.3),
}
"""Sparsities of the methods that the full table does not have at all of them: those with a target, or one that shows
what steps and efforts are worth. A call that names methods runs them at every sparsity it asks for."""

QUICK = ("wanda + refit", "spap, refit only", "spap")
"""The methods of the small table; the others are compared with the first."""

PEERS = tuple(name for name, settings in METHODS.items() if "method" in settings and "update" not in settings)
"""Methods as in their papers: with their own channel selection and their own update."""

STEPPED = tuple(name for name, settings in METHODS.items() if "method" in settings and "alternate" in settings.values())
"""Peers that take the same steps on the weights as ours."""

TARGETS: dict[str, dict[float, float]] = {
    "spap": {0.1: 0.50, 0.2: 0.45, 0.3: 0.45, 0.5: 0.55},
    "spap, high effort": {0.2: 0.30, 0.3: 0.30},
}
"""Targets for the rise in log-perplexity by sparsity, as a fraction of the best peer's."""

QUICK_TARGET = 0.70
"""Target for our rise in log-perplexity, as a fraction of that of Wanda's criterion with a refit."""


def settings_of(method: str, sparsity: float, seed: int) -> spap.PruneSettings:
    """Returns the settings of one run.

    Args:
        method: A key of `METHODS`, or one with changed settings, for example "spap with rounds=3 ridge=0.001". What "+"
            joins is a single change.
        sparsity: Fraction of channels to remove.
        seed: Seed of every random choice.

    Raises:
        UserError: the method is unknown, or a setting is unknown or out of range.
    """
    name, _, words = method.partition(" with ")
    changes = dict(_change(each) for each in words.replace("+", " ").split())
    if name not in METHODS:
        raise spap.UserError(f"unknown method {name!r}; the methods are {'; '.join(METHODS)}.")
    return spap.PruneSettings().replace(sparsity=sparsity, seed=seed, **METHODS[name]).replace(**changes)


def _change(words: str) -> tuple[str, Any]:
    """Parses a setting and its value, for example ridge=0.001; a value that is not JSON is text."""
    name, _, value = words.partition("=")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


_NEWER: dict[str, Any] = {"stream_dtype": "float32", "correction": 1.0, "remat": None}
"""Settings added after the first rows were made, and the values that reproduce what those rows did."""


_OF_STEPS = ("rounds", "steps", "learning_rate", "step_tokens")
"""Settings that only steps on the weights read."""

_FIRST: dict[str, Any] = {
    "rounds": 2, "steps": 200, "learning_rate": 0.03, "step_tokens": 2048,
    "sweeps": 1, "sweep_blocks": 1, "sweep_steps": 150, "sweep_learning_rate": 0.015,
}  # fmt: skip
"""Values that hashes of methods without steps contain in place of all settings of steps, which have no effect on them:
the names and defaults of the time when the first rows were made, so that these rows stay current."""


def settings_hash(settings: spap.PruneSettings) -> str:
    """Hashes every setting that has an effect, and every value derived from the settings, defaults included."""
    derived = {"joint_passes": settings.passes, "round_to": settings.multiple(0)}  # of small models
    values = dataclasses.asdict(settings) | derived | settings.fit._asdict()
    if update_used(settings) != "alternate":
        stepping = (*_OF_STEPS, "moment_dtype", "compute_dtype")
        values = {k: v for k, v in values.items() if k not in stepping and not k.startswith("joint_")} | _FIRST
    text = json.dumps({k: v for k, v in values.items() if k not in _NEWER or v != _NEWER[k]}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def is_current(row: Row) -> bool:
    """Returns whether the row's method means today what it meant when the row was made."""
    try:
        return settings_hash(settings_of(row.method, row.sparsity, row.seed)) == row.settings
    except spap.UserError:  # the method or setting is from an earlier version
        return False
