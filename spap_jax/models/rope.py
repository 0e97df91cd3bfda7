"""Reads the rotary embedding of a Hugging Face config, in the formats of transformers 4 and 5."""

import dataclasses
import math
from typing import Any

from spap_jax.errors import UserError
from spap_jax.models.config import Rope
from spap_jax.models.kinds import of_kind

_ORIGINAL = "original_max_position_embeddings"

ROPE_FIELDS = frozenset({_ORIGINAL, "partial_rotary_factor", "rope_parameters", "rope_scaling", "rope_theta"})
"""Fields of config.json that configure the rotary embedding."""

_NUMBERS = {
    "default": {"theta": "rope_theta"},
    "linear": {"theta": "rope_theta", "factor": "factor"},
    "llama3": {
        "theta": "rope_theta",
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_positions": _ORIGINAL,
    },
    "yarn": {
        "theta": "rope_theta",
        "factor": "factor",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "original_positions": _ORIGINAL,
        "attention_factor": "attention_factor",
    },
}
"""Kind of scaling -> field of `Rope` -> its name in config.json."""

_BASE = 10000.0
"""Default base of transformers if config.json specifies none."""


def read_rope(theirs: dict[str, Any]) -> Rope:
    """Reads both formats: ``rope_theta`` with ``rope_scaling``, and ``rope_parameters``, which contains the base.

    If a config gives a value twice, precedence is as in transformers: ``rope_scaling`` replaces ``rope_parameters``,
    and values inside either take precedence over top-level fields, except the original number of positions.

    Raises:
        UserError: the kind of scaling is not implemented, a number is missing, or an unsupported value is set.
    """
    old, new = (of_kind(name, theirs.get(name) or {}, dict) for name in ("rope_scaling", "rope_parameters"))
    scaling = old or new
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in tuple(_NUMBERS):  # a kind from JSON need not be hashable
        raise UserError(f"rope scaling {kind!r} is not implemented; the port computes {', '.join(_NUMBERS)}.")
    names = _NUMBERS[kind]
    given: dict[str, Any] = {"rope_theta": _BASE} | {
        n: theirs[n] for n in ("rope_theta", "partial_rotary_factor") if n in theirs
    }
    given |= {name: value for name, value in scaling.items() if name not in ("rope_type", "type")}
    if _ORIGINAL in names.values() and _ORIGINAL in theirs:
        given[_ORIGINAL] = theirs[_ORIGINAL]
    if kind == "yarn":
        given = {"beta_fast": 32.0, "beta_slow": 1.0} | given
        more, less = (of_kind(name, given.pop(name, None) or 0.0, float) for name in ("mscale", "mscale_all_dim"))
        if given.get("attention_factor") is None:
            stretch = 0.1 * math.log(max(1.0, _positive("factor", given.get("factor", 1.0))))
            both = more and less  # with one of them alone, transformers reads neither
            given["attention_factor"] = (more * stretch + 1) / (less * stretch + 1) if both else stretch + 1
    if missing := sorted(set(names.values()) - given.keys()):
        raise UserError(f"config.json's rope scaling {kind!r} lacks {', '.join(missing)}.")
    numbers = {ours: _positive(name, given[name]) for ours, name in names.items()}
    if kind == "llama3" and numbers["low_freq_factor"] == numbers["high_freq_factor"]:
        raise UserError(
            "config.json gives the same low_freq_factor and high_freq_factor, which llama3 cannot have: correct it."
        )
    whole = {"partial_rotary_factor": 1.0, "truncate": True}  # the defaults
    unread = {n: v for n, v in given.items() if n not in names.values() and v not in (None, whole.get(n))}
    if unread:
        raise UserError(f"config.json's rope scaling {kind!r} sets {unread}, which this port does not compute.")
    return dataclasses.replace(Rope(scaling=kind), **numbers)


def _positive(name: str, value: Any) -> float:
    number = of_kind(name, value, float)
    if number == 0:
        raise UserError(f"config.json gives {name} = 0, which must be positive: correct it.")
    return number
