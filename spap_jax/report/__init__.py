"""The reports of runs, model cards made of them, and the page of ``spap report``."""
