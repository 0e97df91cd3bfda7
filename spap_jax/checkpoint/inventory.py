"""The tensors that a checkpoint of a config must have, and the check of those that it has."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict

from spap_jax.checkpoint.tensors import DTYPES, Tensor, TensorFiles
from spap_jax.errors import UserError
from spap_jax.models import FAMILIES, DecoderConfig, Family, Params, Rule

_LISTED = 10


class Expected(NamedTuple):
    """One tensor of a checkpoint: its rule, and its shape in the checkpoint."""

    rule: Rule
    shape: tuple[int, ...]


def expected_tensors(config: DecoderConfig, head_stored: bool = False) -> dict[str, Expected]:
    """Every tensor of a checkpoint by name: those outside of the layers, then layer by layer.

    ``head_stored`` says whether the checkpoint of a tied model stores the embedding as head, too.
    """
    rules, sizes = FAMILIES[config.family].rules_for(config), config.axes
    in_layers = [config.of_layer(layer).axes for layer in range(config.layers)]
    outer = {rule.theirs: Expected(rule, rule.shapes(sizes)[0]) for rule in rules if not rule.stacked}
    if head_stored:
        tokens = next(rule for rule in rules if rule.ours == "embed/tokens")
        outer[config.head_name] = Expected(tokens, tokens.shapes(sizes)[0])
    return outer | {
        rule.theirs.format(i=layer): Expected(rule, rule.shapes(own)[0])
        for layer, own in enumerate(in_layers)
        for rule in rules
        if rule.stacked
    }


def fused_tensors(config: DecoderConfig) -> dict[str, dict[str, int]]:
    """Tensors that a checkpoint stores as one: its name -> the number of rows of each by name, from the first on."""
    family = FAMILIES[config.family]
    if not family.fused:
        return {}
    rows = {name: each.shape[0] for name, each in expected_tensors(config).items()}
    return {
        whole.format(i=layer): {part.format(i=layer): rows[part.format(i=layer)] for part in parts}
        for layer in range(config.layers)
        for whole, parts in family.fused.items()
    }


def joined(config: DecoderConfig, tensors: Mapping[str, Any], join: Callable[[list[Any]], Any]) -> dict[str, Any]:
    """Replaces tensors that a checkpoint stores as one by what ``join`` makes of them."""
    found = dict(tensors)
    for whole, parts in fused_tensors(config).items():
        if found.keys() >= parts.keys():
            found[whole] = join([found.pop(part) for part in parts])
    return found


def split(config: DecoderConfig, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Inverts `joined` for arrays, as views of them."""
    found = dict(tensors)
    for whole, parts in fused_tensors(config).items():
        if whole in found:
            cuts = np.cumsum(list(parts.values()))[:-1]
            found |= zip(parts, np.split(found.pop(whole), cuts), strict=True)
    return found


def stored_names(files: TensorFiles, family: Family, config: DecoderConfig) -> dict[str, str]:
    """Maps full names of the decoder's tensors to names in the files, without buffers that are recomputed.

    Where the embedding is tied to the head, a file may hold either of the two names.

    Raises:
        UserError: Two names mean the same tensor.
    """
    stored: dict[str, str] = {}
    for name in files.tensors:
        full = family.canonical(name, config)
        if full in stored:
            raise UserError(
                f"{full} is stored twice, as {stored[full]} and as {name}: get a checkpoint that stores it once."
            )
        if full is not None:
            stored[full] = name
    embedding = next(rule.theirs for rule in family.rules_for(config) if rule.ours == "embed/tokens")
    if config.tied and embedding not in stored and config.head_name in stored:
        stored[embedding] = stored.pop(config.head_name)
    return stored


def check_inventory(name: str, files: TensorFiles, stored: dict[str, str], expected: dict[str, Expected]) -> None:
    """Raises one UserError that lists every tensor that is missing, unexpected, or of the wrong shape or dtype."""
    both = {full: files.tensors[stored[full]] for full in expected if full in stored}
    sizes = ((full, tensor.shape, expected[full].shape) for full, tensor in both.items())
    shapes = (f"{full} {list(shape)} instead of {list(right)}" for full, shape, right in sizes if shape != right)
    dtypes = (f"{full} {tensor.dtype}" for full, tensor in both.items() if tensor.dtype not in DTYPES)
    parts = [
        _listed("tensors are missing", (full for full in expected if full not in stored)),
        _listed("tensors are unexpected", (full for full in stored if full not in expected)),
        _listed("shapes are wrong", shapes),
        _listed("dtypes cannot be pruned (quantised, or wider than float32)", dtypes),
        _listed("weights change their dtype between layers", _mixed_dtypes(both, expected)),
    ]
    if any(parts):
        raise UserError(
            f"the weights of {name} do not fit its config.json: {'; '.join(part for part in parts if part)}. "
            "Get a checkpoint whose files belong together."
        )


def filled_up(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Pads the weights of a layer with zeros to the shape of the widest layer."""
    if array.shape == shape:
        return array
    room = np.zeros(shape, array.dtype)
    room[corner(array.shape)] = array
    return room


def corner(shape: tuple[int, ...]) -> tuple[slice, ...]:
    """The slices that select a layer's weights in an array of the widest layer's shape."""
    return tuple(slice(size) for size in shape)


def array_dtypes(params: Params, config: DecoderConfig) -> dict[str, str]:
    """Name of the dtype of every weight of a parameter tree, by its path."""
    arrays: dict[str, Any] = flatten_dict(params, sep="/")
    return {rule.ours: arrays[rule.ours].dtype.name for rule in FAMILIES[config.family].rules_for(config)}


def _mixed_dtypes(tensors: dict[str, Tensor], expected: dict[str, Expected]) -> Iterator[str]:
    """Lists the weights of one kind that differ in dtype, although they have to share an array."""
    seen: dict[Rule, dict[str, str]] = {}
    for full, tensor in tensors.items():
        seen.setdefault(expected[full].rule, {}).setdefault(tensor.dtype, full)
    for names_of_dtypes in seen.values():
        if len(names_of_dtypes) > 1:
            yield " but ".join(f"{full} {dtype}" for dtype, full in names_of_dtypes.items())


def _listed(what: str, names: Iterable[str]) -> str:
    """Formats a fault with its names; empty if there are none, and a long list is cut."""
    names = list(names)
    shown = ", ".join(names[:_LISTED]) + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")
    return f"{what} ({shown})" if names else ""
