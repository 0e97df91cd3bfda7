"""FLAP's compensation: the output bias makes up for the mean of the channels removed."""

from jax import Array

from spap_jax.numerics import full_precision


@full_precision
def lost_mean(weight: Array, mean: Array, kept: Array) -> Array:
    """``sum_j mean(h_j) W_j`` over the channels removed, [d]: what FLAP (An et al. 2024) adds to the output bias.

    Where the weights stay and the target is the dense output on the same tokens, no other bias has a smaller error.
    Here the means are those of the stream that the pruned blocks before produce; FLAP, which ranks the channels of all
    layers together, takes the dense one's. What earlier blocks broke is not repaired, as there.

    Args:
        weight: [f,d] the dense output projection.
        mean: [f] mean of each hidden channel over the calibration tokens.
        kept: [k] channel numbers.
    """
    return mean.at[kept].set(0) @ weight
