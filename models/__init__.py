"""Flax ports of the supported decoders; imported as ``spap_jax.models``."""

if __name__ != "spap_jax.models":
    raise ImportError("this folder is the package 'spap_jax.models': import it by that name (pip install -e . first).")
