"""Lazy arrays of the weights in a checkpoint's files: indexing reads only the selected part."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from spap_jax.checkpoint.inventory import filled_up
from spap_jax.checkpoint.tensors import DTYPES, TensorFiles
from spap_jax.errors import UserError
from spap_jax.models import Rule
from spap_jax.models.host_arrays import copy_into

Index = tuple[slice, ...]


class Stored:
    """One lazy array of a parameter tree, of one layer or outside of the layers; ``numpy.asarray`` reads all of it.

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

    def __getitem__(self, index: Index) -> np.ndarray:
        """Reads a part of the array, given by a slice for each axis, and no more than that.

        Raises:
            UserError: The file is damaged, a weight is not finite, or the twin differs.
        """
        spans = [cut.indices(size)[:2] for cut, size in zip(index, self.shape, strict=True)]
        own = [
            slice(min(start, size), min(stop, size))
            for (start, stop), size in zip(spans, self._rule.shapes(self._sizes)[1], strict=True)
        ]
        return filled_up(self._read(tuple(own)), tuple(stop - start for start, stop in spans))

    def _read(self, index: Index) -> np.ndarray:
        shape = tuple(cut.stop - cut.start for cut in index)
        if 0 in shape:  # safetensors refuses a part of nothing at the end of a tensor
            return np.empty(shape, self.dtype)
        cuts, sizes = self._rule.theirs_of(index, self._sizes)
        tensor = self._files.read(self._name, cuts)
        if self._twin is not None:
            _check_same(tensor, self._files.read(self._twin, cuts), self._twin)
        return self._rule.read(tensor, sizes)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Reads all of the array."""
        return self[(slice(None),) * len(self.shape)].astype(dtype or self.dtype, copy=False)


class Stack:
    """The arrays of all layers as one [L, ...]; at most one layer is in memory twice."""

    def __init__(self, layers: Sequence[Stored]):
        """Prepares the array; nothing is read yet."""
        self._layers = layers
        self.shape, self.dtype = (len(layers), *layers[0].shape), layers[0].dtype

    def __getitem__(self, index: Index | int) -> "np.ndarray | Stored":
        """Reads a part of the stack, as in `Stored`; the array of one layer, given its number, is not read yet."""
        return self._layers[index] if isinstance(index, int) else self._read(index)

    def _read(self, index: Index) -> np.ndarray:
        which = range(*index[0].indices(len(self._layers)))
        first = self._layers[which[0]][index[1:]]
        stack = np.empty((len(which), *first.shape), first.dtype)
        copy_into(stack[0], first)
        for place, number in enumerate(which[1:], start=1):
            copy_into(stack[place], self._layers[number][index[1:]])
        return stack

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Reads all of the array."""
        return self._read((slice(None),) * len(self.shape)).astype(dtype or self.dtype, copy=False)


def _check_same(tokens: np.ndarray, head: np.ndarray, name: str) -> None:
    if not np.array_equal(np.ascontiguousarray(head).view(np.uint8), np.ascontiguousarray(tokens).view(np.uint8)):
        raise UserError(
            f"config.json ties the head to the embedding, but {name} differs from it: "
            "set tie_word_embeddings to false if the head is the right one, or remove the tensor."
        )
