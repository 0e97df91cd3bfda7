"""Arithmetic that means what it says: float32 products at full precision, BLAS threads that do not spin."""

import os
import sys

# jaxlib's CPU factorisations run in scipy's OpenBLAS, whose threads spin when a core is busy and then take many times
# as long as one thread. The variable is read when that library loads, so it is set before JAX is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

if "scipy" in sys.modules:  # loaded before us: the variable comes too late, so tell the library itself
    import threadpoolctl

    threadpoolctl.threadpool_limits(1, user_api="blas")

import jax

full_precision = jax.default_matmul_precision("highest")
"""Context manager and decorator: matrix products in true float32 on TPUs and on GPUs with TF32."""
