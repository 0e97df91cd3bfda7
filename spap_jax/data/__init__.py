"""Calibration and evaluation data, from a name, a file, a conversation or memory to token blocks."""
