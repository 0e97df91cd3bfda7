"""Passes over large arrays in the host's memory, which numpy makes several times slower than the memory allows.

It converts bfloat16 one value at a time, and transposes by rows, so that each value of a column takes a cache line.
"""

import numpy as np

_PIECE = 1 << 17
"""Values that are judged at a time; they and what is computed from them fit a core's cache."""

_TILE = 128
"""Rows and columns that are transposed at a time."""


def is_finite(array: np.ndarray) -> bool:
    """Whether an array of floats has neither NaN nor infinity; of 16-bit floats, the bits are compared."""
    if array.itemsize != 2 or array.ndim == 0:
        return bool(np.isfinite(array).all())
    infinity = np.array(np.inf, array.dtype).view(np.uint16)
    bits, rows = array.view(np.uint16), max(1, _PIECE * len(array) // max(1, array.size))
    pieces = (bits[start : start + rows] for start in range(0, len(bits), rows))
    return all((piece & np.uint16(0x7FFF)).max(initial=0) < infinity for piece in pieces)


def transposed(matrix: np.ndarray) -> np.ndarray:
    """The transpose of a matrix as a contiguous array, bit for bit."""
    bits = matrix.view(f"u{matrix.itemsize}")
    result = np.empty(bits.shape[::-1], bits.dtype)
    for row in range(0, bits.shape[0], _TILE):
        for column in range(0, bits.shape[1], _TILE):
            tile = bits[row : row + _TILE, column : column + _TILE]
            result[column : column + _TILE, row : row + _TILE] = tile.T
    return result.view(matrix.dtype)
