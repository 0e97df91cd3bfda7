"""Flax ports of the supported decoders."""
