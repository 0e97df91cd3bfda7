"""The mathematics of pruning one layer: matrices in, channels and weights out; it knows no model."""
