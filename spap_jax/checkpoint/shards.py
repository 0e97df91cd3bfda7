"""The weight files of a run: parameters of the decoder to tensors of a checkpoint and back, a file for each block."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from spap_jax.checkpoint import inventory, weight_files
from spap_jax.checkpoint.tensors import DTYPES, Tensor
from spap_jax.errors import NotFiniteError
from spap_jax.models import FAMILIES, DecoderConfig, Params, Rule
from spap_jax.parallel.placement import layer_to_host

OUTER = "outer.safetensors"
"""Name of the file with the parameters outside of the blocks."""


def block_file(role: str, index: int) -> str:
    """Name of the file of a block: of the role "block", or "joint" once joint steps have changed it."""
    return f"{role}-{index:05d}.safetensors"


@dataclass(frozen=True)
class Shards:
    """How the parameters of a config are written.

    Attributes:
        head_stored: Whether the checkpoint of a tied model stores the embedding as head, too.
        dtypes: Names of the arrays' dtypes by path; biases that pruning adds have that of the MLP's output projection.
        dtype: Name of the dtype of all weights, if they do not keep their own.
    """

    config: DecoderConfig
    head_stored: bool
    dtypes: Mapping[str, str]
    dtype: str | None

    def rules(self, stacked: bool) -> list[Rule]:
        """The rules for the parameters of the blocks, or for those outside of them."""
        return [rule for rule in FAMILIES[self.config.family].rules_for(self.config) if rule.stacked == stacked]

    def tensors(self) -> dict[str, Tensor]:
        """Shape and dtype of every tensor of the checkpoint."""
        expected = inventory.expected_tensors(self.config, self.head_stored)
        found = {name: Tensor(each.shape, self._dtype_of(each.rule.ours).name) for name, each in expected.items()}
        return inventory.joined(self.config, found, _joined)

    def total_bytes(self) -> int:
        """Number of bytes of all tensors."""
        return sum(tensor.bytes for tensor in self.tensors().values())

    def cast_to_host(self, layer: Params) -> Params:
        """The parameters of a block on the host, in the dtypes in which they are written; still padded."""
        flat: dict[str, Any] = dict(flatten_dict(layer, sep="/"))
        on_devices = all(isinstance(array, jax.Array) for array in flat.values())
        with np.errstate(over="ignore"):
            for name, array in flat.items():
                flat[name] = (array if on_devices else np.asarray(array)).astype(self._dtype_of(f"layers/{name}"))
        layer = unflatten_dict(flat, sep="/")
        return layer_to_host(layer) if on_devices else layer

    def encode_block(self, index: int, layer: Params, report: Any) -> bytes:
        """The file of a block, from its padded parameters on the host and a JSON value.

        Raises:
            NotFiniteError: A weight is not finite.
            ValueError: Channels that the config does not have are not zero.
        """
        arrays: dict[str, Any] = dict(flatten_dict({"layers": layer}, sep="/"))
        own = self.config.of_layer(index).axes
        tensors = {}
        for rule in self.rules(stacked=True):
            name, array = rule.theirs.format(i=index), arrays[rule.ours]
            cut = array[inventory.corner(rule.shapes(own)[1])]
            if array.shape != rule.shapes(self.config.axes)[1] or np.count_nonzero(cut) < np.count_nonzero(array):
                raise ValueError(f"{name} of an array {list(array.shape)} does not fit the config")
            tensors[name] = rule.write(_finite(name, cut), own)
        return weight_files.encode(inventory.joined(self.config, tensors, np.concatenate), report)

    def decode_block(self, index: int, tensors: Mapping[str, np.ndarray]) -> Params:
        """The parameters of a block, padded to the widest one, from the tensors of its file."""
        own, room = self.config.of_layer(index).axes, self.config.axes
        tensors = inventory.split(self.config, tensors)
        arrays = {
            rule.ours: inventory.filled_up(rule.read(tensors[rule.theirs.format(i=index)], own), rule.shapes(room)[1])
            for rule in self.rules(stacked=True)
        }
        return unflatten_dict(arrays, sep="/")["layers"]

    def encode_outer(self, arrays: Mapping[str, Any]) -> bytes:
        """The file of the parameters outside of the blocks, from arrays by path.

        Raises:
            NotFiniteError: A weight is not finite.
        """
        tensors = {}
        for rule in self.rules(stacked=False):
            with np.errstate(over="ignore"):
                array = np.asarray(arrays[rule.ours]).astype(self._dtype_of(rule.ours), copy=False)
            tensors[rule.theirs] = rule.write(_finite(rule.theirs, array), self.config.axes)
            if rule.ours == "embed/tokens" and self.head_stored:
                tensors[self.config.head_name] = tensors[rule.theirs]
        return weight_files.encode(tensors)

    def index_text(self, names: Sequence[str], copied: Mapping[str, str], total: int) -> str:
        """The index of the files: of the one outside of the blocks, named first, of each block, and of other tensors.

        ``copied`` maps those to their files; ``total`` is the number of bytes of all tensors.
        """
        layers = range(self.config.layers)
        blocks = {rule.theirs.format(i=i): names[i + 1] for i in layers for rule in self.rules(stacked=True)}
        files = {**dict.fromkeys(self.tensors(), names[0]), **blocks, **copied}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))}
        return json.dumps(index, indent=2) + "\n"

    def _dtype_of(self, ours: str) -> np.dtype:
        return DTYPES[self.dtype or self.dtypes.get(ours, self.dtypes["layers/mlp/down"])]


def _joined(parts: list[Tensor]) -> Tensor:
    """Header of the tensor that holds others, one below another."""
    return Tensor((sum(part.shape[0] for part in parts), *parts[0].shape[1:]), parts[0].dtype)


def _finite(name: str, array: np.ndarray) -> np.ndarray:
    if not np.isfinite(array).all():
        raise NotFiniteError(
            f"the weight {name} became NaN or infinity, or its values are too large for {array.dtype}, so the model is "
            "not written."
        )
    return array
