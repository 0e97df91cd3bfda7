"""FLAP's compensation: the output bias absorbs the mean contribution of the removed channels."""

from jax import Array

from spap_jax.numerics import full_precision


@full_precision
def lost_mean(weight: Array, mean: Array, kept: Array) -> Array:
    """Computes FLAP's (An et al. 2024) addition to the output bias: ``sum_j mean(h_j) W_j`` over removed channels, [d].

    If the weights are unchanged and the target is the dense output on the same tokens, this bias minimises the error.
    The means here come from the stream that the previous pruned blocks produce; FLAP, which ranks the channels of all
    layers together, uses the dense stream. As in FLAP, the errors of earlier blocks are not corrected.

    Args:
        weight: [f,d] the dense output projection.
        mean: [f] mean of each hidden channel over the calibration tokens.
        kept: [k] channel numbers.
    """
    return mean.at[kept].set(0) @ weight
