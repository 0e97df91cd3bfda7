"""Layers with a window beside layers that attend to all previous tokens, as ``layer_types`` names them."""

from typing import Any

from spap_jax.errors import UserError
from spap_jax.models.config import AttentionKind, Rope
from spap_jax.models.kinds import of_kind
from spap_jax.models.rope import read_rope

TYPES = ("sliding_attention", "full_attention")
"""Names of the types of layers in config.json, in the order of their kinds of attention."""


def read_kinds(theirs: dict[str, Any], read: dict[str, Any], ropes: tuple[Rope, Rope], period: int) -> dict[str, Any]:
    """Reads which kind of attention each layer has; by default the last layer of every ``period`` attends to all.

    ``ropes`` are those of `TYPES`. Returns what a family's ``attention_kinds`` does.

    Raises:
        UserError: ``layer_types`` is no list of one of `TYPES` for each layer.
    """
    types, layers = theirs.get("layer_types"), read["layers"]
    if types is None:
        types = [TYPES[(layer + 1) % period == 0] for layer in range(layers)]
    if not isinstance(types, list) or len(types) != layers or any(name not in TYPES for name in types):
        raise UserError(
            f"config.json gives layer_types = {types!r}, which must be {' or '.join(TYPES)} for each of the "
            f"{layers} layers: correct it."
        )
    near, far = ropes
    return {
        "attention_kinds": (AttentionKind(near, read["window"]), AttentionKind(far)),
        "layer_kinds": tuple(map(TYPES.index, types)),
    }


def read_ropes(theirs: dict[str, Any], near: float, far: float) -> tuple[Rope, Rope]:
    """Reads a rotary embedding for each of `TYPES`, in the forms of transformers 4 and 5.

    ``near`` and ``far`` are the bases if none is given with the type; a scaling without a type is that of the latter.

    Raises:
        UserError: There is an embedding for another type, or one that is not implemented.
    """
    ropes = of_kind("rope_parameters", theirs.get("rope_parameters") or {}, dict)
    if other := ropes.keys() - set(TYPES):
        raise UserError(
            f"config.json gives {', '.join(sorted(other))} in rope_parameters, which must have one entry for each type "
            f"of layer, {' and '.join(TYPES)}: correct it."
        )
    local, full = (of_kind("rope_parameters", ropes.get(name) or {}, dict) for name in TYPES)
    full = full | of_kind("rope_scaling", theirs.get("rope_scaling") or {}, dict)
    return (
        read_rope({"rope_theta": near, "rope_parameters": local}),
        read_rope({"rope_theta": far, "rope_parameters": full}),
    )


def kind_fields(kinds: tuple[int, ...]) -> dict[str, Any]:
    """Returns the field of config.json that says the kind of each layer."""
    return {"layer_types": [TYPES[kind] for kind in kinds]}
