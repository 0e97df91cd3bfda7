"""Pruning of a decoder, block by block."""
