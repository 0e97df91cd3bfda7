"""The mathematics of pruning one layer: matrices in, channels and weights out, independent of any model.

`solve` performs all steps. The steps are functions of a `Problem`, the second moments of one layer, or of the `System`
that `equilibrate` builds from it: `select` and `polish` choose the channels, `refit` solves for their output
projection, `objective` and `relative_error` evaluate a choice. All are pure and work under ``jax.jit`` and
``jax.vmap``.

>>> import jax, numpy as np
>>> from spap_jax import solver
>>> hidden, weight = np.random.default_rng(0).normal(size=(500, 64)), np.eye(64)[:, 48:]
>>> gram, cross = hidden.T @ hidden / 500, hidden.T @ (hidden @ weight) / 500
>>> solver.solve(gram, cross, weight, keep=16).kept
Array([48, 49, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60, 61, 62, 63],      dtype=int32)
"""

from spap_jax.solver.penalty import select
from spap_jax.solver.problem import Problem, System, equilibrate, objective, refit, relative_error
from spap_jax.solver.solution import Solution, solve
from spap_jax.solver.swap import Polished, polish

__all__ = [
    "Polished",
    "Problem",
    "Solution",
    "System",
    "equilibrate",
    "objective",
    "polish",
    "refit",
    "relative_error",
    "select",
    "solve",
]
