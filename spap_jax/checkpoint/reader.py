"""Reads Hugging Face folders, layer by layer or completely."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import unflatten_dict

from spap_jax.checkpoint import inventory
from spap_jax.checkpoint.config_text import read_config_text, understood
from spap_jax.checkpoint.fingerprint import fingerprint
from spap_jax.checkpoint.inventory import filled_up
from spap_jax.checkpoint.ranged import AtAddress
from spap_jax.checkpoint.tensors import DTYPES, TensorFiles
from spap_jax.errors import UserError
from spap_jax.models import DecoderConfig, Params, Rule, named_as
from spap_jax.models.host_arrays import copy_into
from spap_jax.models.model import Model, Source
from spap_jax.parallel.placement import shard_params

PlaceParams = Callable[[DecoderConfig, Params], Params]
"""Places stored parameters on devices, as JAX arrays."""


def as_stored(config: DecoderConfig, params: Params) -> Params:
    """Leaves parameters in their files; indexing reads parts of them later."""
    return params


def on_host(config: DecoderConfig, params: Params) -> Params:
    """Reads parameters into the memory of the host, as numpy arrays."""
    return jax.tree.map(np.asarray, params)


class Stored:
    """One lazy array of a parameter tree, of one layer or outside of the layers; ``numpy.asarray`` reads it.

    Its shape is that in the parameter tree, its dtype that in the checkpoint.
    """

    def __init__(
        self,
        files: TensorFiles,
        name: str,
        rule: Rule,
        sizes: dict[str, int],
        room: tuple[int, ...],
        twin: str | None = None,
    ):
        """Prepares the array; nothing is read yet.

        Args:
            rule: Rule that turns the tensor with this name into the array.
            room: Shape of the array, which may be wider than the tensor and is then padded with zeros.
            twin: Name of a tensor that has to be equal.
        """
        self._files, self._name, self._rule, self._sizes, self._twin = files, name, rule, sizes, twin
        self.shape = room
        self.dtype = DTYPES[files.tensors[name].dtype]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Reads the array.

        Raises:
            UserError: The file is damaged, a weight is not finite, or the twin differs.
        """
        whole = tuple(map(slice, self._files.tensors[self._name].shape))
        tensor = self._files.read(self._name, whole)
        if self._twin is not None:
            _check_tied(tensor, self._files.read(self._twin, whole), self._twin)
        return filled_up(self._rule.read(tensor, self._sizes), self.shape).astype(dtype or self.dtype, copy=False)


class Stack:
    """The arrays of all layers as one [L, ...]; at most one layer is in memory twice."""

    def __init__(self, layers: Sequence[Stored]):
        """Prepares the array; nothing is read yet."""
        self._layers = layers
        self.shape, self.dtype = (len(layers), *layers[0].shape), layers[0].dtype

    def __getitem__(self, index: int) -> Stored:
        """The array of one layer, which is not read yet."""
        return self._layers[index]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Reads all of the array."""
        stack = np.empty(self.shape, self.dtype)
        for place, layer in zip(stack, self._layers, strict=True):
            copy_into(place, np.asarray(layer))
        return stack.astype(dtype or self.dtype, copy=False)


class Reader:
    """A Hugging Face folder whose config and tensors have been checked against each other; data are read on demand.

    Attributes:
        source: Where the model came from, for writing it back.
        bytes: Number of bytes of all tensors.
        dtypes: Names of the dtypes of its weights, by their path in the parameter tree.
        at_address: Whether the weights are read from an address.
    """

    def __init__(self, folder: str | Path, name: str | None = None):
        """Reads config.json and the headers of the weight files; ``name`` is the one that the user gave, if not the
        folder.

        Raises:
            UserError: The model is not supported, or its files do not match; all faults are listed at once.
        """
        self._folder = folder = Path(folder)
        name = name or str(folder)
        text = read_config_text(folder / "config.json")
        self.family, self.config = understood(text, name)
        self._elsewhere = AtAddress.of(folder)
        self.at_address = self._elsewhere is not None
        self._files = TensorFiles(folder, self._elsewhere)
        if self.config.in_tower:
            self.config = named_as(self.config, self._files.tensors, name)
        self._files.split(inventory.fused_tensors(self.config))
        self._rules = self.family.rules_for(self.config)
        self._stored = inventory.stored_names(self._files, self.family, self.config)
        head_stored = self.config.tied and self.config.head_name in self._stored
        expected = inventory.expected_tensors(self.config, head_stored)
        inventory.check_inventory(name, self._files, self._stored, expected)
        self.source = Source(name, folder.absolute(), text, head_stored)
        stored = {full: self._files.tensors[theirs] for full, theirs in self._stored.items()}
        self.bytes = sum(tensor.bytes for tensor in stored.values())
        self.dtypes = {each.rule.ours: stored[full].dtype for full, each in expected.items()}

    def fingerprint(self) -> str:
        """Computes the fingerprint of the config and the weights; see `fingerprint.py`."""
        return fingerprint(self._folder)

    def check_unchanged(self) -> None:
        """Checks that weights at an address are still those that were read.

        Raises:
            UserError: They are not, or the store fails.
        """
        if self._elsewhere:
            self._elsewhere.check_unchanged()

    def check_finite(self, watch: Callable[[int, int], None] = lambda *_: None) -> None:
        """Reads all weights, a piece at a time: pruning layer by layer would reach the last ones hours later.

        ``watch`` is called with the number of bytes checked so far, and the total number.

        Raises:
            UserError: A file is damaged, or a weight is not finite.
        """
        seen = 0
        for name in self._stored.values():
            for cuts in self._files.pieces(name):
                watch(seen, self.bytes)
                seen += self._files.read(name, cuts).nbytes
        watch(self.bytes, self.bytes)

    def outer(self) -> Params:
        """The parameters outside of the layers, as `Stored`, which reads data on demand."""
        outer = {rule.ours: self._array(rule) for rule in self._rules if not rule.stacked}
        return {"embed": {}, "head": {}} | unflatten_dict(outer, sep="/")

    def layer(self, index: int) -> Params:
        """The parameters of one layer, as `Stored`, padded to the config's widest layer."""
        arrays = {rule.ours: self._array(rule, index) for rule in self._rules if rule.stacked}
        return unflatten_dict(arrays, sep="/")["layers"]

    def model(self, place: PlaceParams = shard_params) -> Model:
        """Reads the complete model, with stacked layers; ``place`` puts it on devices, by default those of the mesh.

        Raises:
            UserError: A file is damaged, a weight is not finite, or a tied model stores a head of its own.
        """
        layers = range(self.config.layers)
        stacks = {r.ours: Stack([self._array(r, layer) for layer in layers]) for r in self._rules if r.stacked}
        params = self.outer() | unflatten_dict(stacks, sep="/")
        return Model(self.config, place(self.config, params), self.source)

    def _array(self, rule: Rule, layer: int | None = None) -> Stored:
        twin = self._stored[self.config.head_name] if self.source.head_stored and rule.ours == "embed/tokens" else None
        own = self.config if layer is None else self.config.of_layer(layer)
        room = rule.shapes(self.config.axes)[1]
        return Stored(self._files, self._stored[rule.theirs.format(i=layer)], rule, own.axes, room, twin)


def _check_tied(tokens: np.ndarray, head: np.ndarray, name: str) -> None:
    if not np.array_equal(np.ascontiguousarray(head).view(np.uint8), np.ascontiguousarray(tokens).view(np.uint8)):
        raise UserError(
            f"config.json ties the head to the embedding, but {name} differs from it: "
            "set tie_word_embeddings to false if the head is the right one, or remove the tensor."
        )
