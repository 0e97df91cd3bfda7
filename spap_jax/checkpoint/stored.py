"""Lazy arrays of the weights in a checkpoint's files."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from spap_jax.checkpoint.inventory import filled_up
from spap_jax.checkpoint.tensors import DTYPES, TensorFiles
from spap_jax.errors import UserError
from spap_jax.models import Rule
from spap_jax.models.host_arrays import copy_into


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
            _check_same(tensor, self._files.read(self._twin, whole), self._twin)
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


def _check_same(tokens: np.ndarray, head: np.ndarray, name: str) -> None:
    if not np.array_equal(np.ascontiguousarray(head).view(np.uint8), np.ascontiguousarray(tokens).view(np.uint8)):
        raise UserError(
            f"config.json ties the head to the embedding, but {name} differs from it: "
            "set tie_word_embeddings to false if the head is the right one, or remove the tensor."
        )
