"""Weights as they lie in the files of a checkpoint: arrays of which a part is read when an index asks for it."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from spap_jax.checkpoint.inventory import filled_up
from spap_jax.checkpoint.tensors import DTYPES, TensorFiles
from spap_jax.errors import UserError
from spap_jax.models.rules import Rule

Index = tuple[slice, ...]


class Stored:
    """One array of one layer, or of none, of a parameter tree; ``numpy.asarray`` reads all of it.

    Attributes:
        shape: As the parameter tree has it.
        dtype: That of the checkpoint.
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
        """Nothing is read yet.

        Args:
            files: Where the tensor is.
            name: Its own.
            rule: How it becomes the array.
            sizes: Of all axes.
            room: Shape of the array, which may be wider than the tensor: zeros fill it up.
            twin: A tensor that has to be the same.
        """
        self._files, self._name, self._rule, self._sizes, self._twin = files, name, rule, sizes, twin
        self.shape = room
        self.dtype = DTYPES[files.dtype(name)]

    def __getitem__(self, index: Index) -> np.ndarray:
        """A part of the array, a slice for each axis; no more than that is read.

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
        cuts, sizes = self._rule.theirs_of(index, self._sizes)
        tensor = self._files.read(self._name, cuts)
        if self._twin is not None:
            _check_same(tensor, self._files.read(self._twin, cuts), self._twin)
        return self._rule.read(tensor, sizes)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """All of it."""
        return self[(slice(None),) * len(self.shape)].astype(dtype or self.dtype, copy=False)


class Stack:
    """The arrays of all layers as one [L, ...], filled in place: no more than one is held twice."""

    def __init__(self, layers: Sequence[Stored]):
        """Nothing is read yet."""
        self._layers = layers
        self.shape, self.dtype = (len(layers), *layers[0].shape), layers[0].dtype

    def __getitem__(self, index: Index) -> np.ndarray:
        """A part, as of one layer."""
        which = range(*index[0].indices(len(self._layers)))
        first = self._layers[which[0]][index[1:]]
        stack = np.empty((len(which), *first.shape), first.dtype)
        stack[0] = first
        for place, number in enumerate(which[1:], start=1):
            stack[place] = self._layers[number][index[1:]]
        return stack

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """All of it."""
        return self[(slice(None),) * len(self.shape)].astype(dtype or self.dtype, copy=False)


def _check_same(tokens: np.ndarray, head: np.ndarray, name: str) -> None:
    if not np.array_equal(np.ascontiguousarray(head).view(np.uint8), np.ascontiguousarray(tokens).view(np.uint8)):
        raise UserError(
            f"config.json ties the head to the embedding, but {name} differs from it: "
            "set tie_word_embeddings to false if the head is the right one, or remove the tensor."
        )
