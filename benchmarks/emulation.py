"""Runs a module on CPUs with the rounding of an accelerator's matrix products, to see what that does to a result.

``python -m benchmarks.emulation spap_jax prune MODEL ...`` or ``... benchmarks.quality ...``: the factors of each
product are rounded as its precision (`spap_jax.numerics`) asks, and XLA:CPU, which ignores it, multiplies what is left
in float32. Optimizer steps are not rounded.
"""

import runpy
import sys
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import mlir
from jax.lax import DotAlgorithmPreset, Precision, dot_general_p

_BY_COMPILER = mlir._platform_specific_lowerings["cpu"][dot_general_p].rule


def _rounded(a: jax.Array) -> jax.Array:
    return jax.lax.reduce_precision(a, exponent_bits=8, mantissa_bits=7)


def _multiplied(a: jax.Array, b: jax.Array, *, precision: Any, **params: Any) -> jax.Array:
    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        return dot_general_p.bind(a, b, precision=(Precision.HIGHEST,) * 2, **params)

    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    high = _rounded(a), _rounded(b)
    total = product(*high)
    if precision == DotAlgorithmPreset.BF16_BF16_F32_X3:
        low = _rounded(a - high[0]), _rounded(b - high[1])
        total = total + (product(high[0], low[1]) + product(low[0], high[1]))
    return total


def _lowered(context: Any, *arguments: Any, **params: Any) -> Any:
    if not isinstance(params["precision"], DotAlgorithmPreset):
        return _BY_COMPILER(context, *arguments, **params)
    return mlir.lower_fun(_multiplied, multiple_results=False)(context, *arguments, **params)


if __name__ == "__main__":
    mlir.register_lowering(dot_general_p, _lowered, platform="cpu")
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
