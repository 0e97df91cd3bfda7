"""Passes over large arrays in the host's memory, which numpy makes several times slower than the memory allows.

It transposes by rows, so that each value of a column takes a cache line.
"""

from collections.abc import Sequence

import numpy as np

_TILE = 128
"""Rows and columns that are copied at a time."""


def contiguous(array: np.ndarray) -> np.ndarray:
    """Returns the array if its values are in order in memory, otherwise a copy in order, bit for bit."""
    if array.flags.c_contiguous:
        return array
    result = np.empty(array.shape, array.dtype)
    copy_into(result, array)
    return result


def stacked(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Stacks arrays of one shape, which may be transposed ones, along a new first axis."""
    result = np.empty((len(arrays), *arrays[0].shape), arrays[0].dtype)
    for place, array in zip(result, arrays, strict=True):
        copy_into(place, array)
    return result


def copy_into(result: np.ndarray, array: np.ndarray) -> None:
    """Copies an array, which may be a transposed one, into a contiguous one of its shape, bit for bit."""
    if array.flags.c_contiguous or array.ndim < 2 or not array.size:
        result[...] = array
        return
    bits = f"u{array.itemsize}"
    source, target = (each.view(bits).reshape(len(each), -1) for each in (array, result))
    for row in range(0, source.shape[0], _TILE):
        for column in range(0, source.shape[1], _TILE):
            tile = slice(row, row + _TILE), slice(column, column + _TILE)
            target[tile] = source[tile]
