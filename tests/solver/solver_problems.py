"""A table of small layers, ordinary and degenerate, and reference results for them in float64 NumPy."""

from itertools import combinations

import jax.numpy as jnp
import numpy as np

from spap_jax.solver.problem import Problem

RIDGE = 1e-4


def tokens(seed, f=24, d=5, n=400, rank=None, correlation=1.0):
    """Return hidden channels [n,f] that share `rank` signals, and a projection [f,d]."""
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=(n, rank or max(2, f // 3))) @ rng.normal(size=(rank or max(2, f // 3), f))
    own = 0 if rank else rng.normal(size=(n, f))
    hidden = np.maximum(correlation * shared + own, 0) if rank is None else shared
    return hidden * np.exp(0.5 * rng.normal(size=f)), rng.normal(size=(f, d))


def problem_of(hidden, weight, target=None):
    target = hidden @ weight if target is None else target
    n = len(hidden)
    moments = (hidden.T @ hidden / n, hidden.T @ target / n, (target**2).sum() / n, weight)
    return Problem(*(jnp.asarray(x, jnp.float32) for x in moments))


def _changed(seed, change, **shape):
    hidden, weight = tokens(seed, **shape)
    change(hidden, weight)
    return problem_of(hidden, weight)


def _dead(hidden, weight):
    hidden[:, [1, 5, 6, 17]] = 0


def _twins(hidden, weight):
    hidden[:, 1::2] = hidden[:, ::2]


def _outlier(hidden, weight):
    hidden[:, 3] *= 1000


def _foreign_target():
    hidden, weight = tokens(7)
    noise = np.random.default_rng(8).normal(size=(len(hidden), weight.shape[1]))
    return problem_of(hidden, weight, hidden @ weight + 2 * noise)


CASES = {
    "ordinary": problem_of(*tokens(0)),
    "independent": problem_of(*tokens(1, correlation=0.0)),
    "redundant": problem_of(*tokens(2, correlation=10.0)),
    "dead channels": _changed(3, _dead),
    "duplicated channels": _changed(4, _twins),
    "rank deficient": problem_of(*tokens(5, rank=6)),
    "fewer tokens than channels": problem_of(*tokens(6, n=10)),
    "outlier channel": _changed(9, _outlier),
    "target is not the dense output": _foreign_target(),
    "nothing excited": problem_of(np.zeros((4, 24)), tokens(10)[1]),
}
WIDTH = 24


def system64(problem, ridge=RIDGE):
    """Return the ridged moments in the original scale: G [f,f], C [f,d]."""
    gram, cross, _, weight = (np.asarray(x, np.float64) for x in problem)
    diagonal = np.diag(gram)
    energy = np.maximum(np.maximum(diagonal, 1e-6 * diagonal.mean()), 1e-30)
    return gram + ridge * np.diag(energy), cross + ridge * energy[:, None] * weight


def scaled64(system):
    """Return the system's own float32 arrays, in float64: G [f,f], C [f,d]."""
    return np.asarray(system.gram, np.float64), np.asarray(system.cross, np.float64)


def explained64(gram, cross, kept):
    """Return the explained power <C_S, V_S>: minus twice the objective."""
    kept = np.asarray(kept)
    return (cross[kept] * np.linalg.solve(gram[np.ix_(kept, kept)], cross[kept])).sum()


def best64(gram, cross, keep):
    """Return the largest explained power of any choice of `keep` channels."""
    sets = np.array(list(combinations(range(len(gram)), keep)))
    grams = gram[sets[:, :, None], sets[:, None, :]]
    return (cross[sets] * np.linalg.solve(grams, cross[sets])).sum((1, 2)).max()


def obs64(gram, cross, keep):
    """Return the channels left by one-at-a-time OBS elimination."""
    kept = list(range(len(gram)))
    while len(kept) > keep:
        inverse = np.linalg.inv(gram[np.ix_(kept, kept)])
        costs = ((inverse @ cross[kept]) ** 2).sum(1) / np.diag(inverse)
        kept.pop(int(costs.argmin()))
    return np.array(kept)
