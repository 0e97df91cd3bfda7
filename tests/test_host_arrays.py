"""Arrays of the host: the results are numpy's own."""

import ml_dtypes
import numpy as np
import pytest

from spap_jax.models.host_arrays import contiguous, copy_into

DTYPES = [np.float32, ml_dtypes.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 3), (129, 300)])
def test_values_are_put_in_order_bit_for_bit(dtype: type, shape: tuple[int, int]):
    size = np.dtype(dtype).itemsize
    bits = np.random.default_rng(0).integers(0, 1 << 16, shape).astype(f"u{size}")  # NaN of all kinds too
    strided = np.ones((shape[0], 2 * shape[1]), dtype)[:, ::2]
    for array in (bits.view(dtype), bits.view(dtype).T, strided, strided.T, bits.view(dtype)[:, :, None].T):
        result = contiguous(array)
        assert result.flags.c_contiguous
        assert result.dtype == array.dtype
        assert np.array_equal(result.view(f"u{size}"), array.view(f"u{size}"))
    ordered = strided.copy()
    assert contiguous(ordered) is ordered


def test_a_layer_of_a_stack():
    stack, layer = np.zeros((2, 3, 4, 5)), np.arange(60.0).reshape(4, 5, 3).transpose(2, 0, 1)
    copy_into(stack[1], layer)
    assert np.array_equal(stack, [np.zeros((3, 4, 5)), layer])
