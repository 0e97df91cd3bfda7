"""What pruning loses: perplexity and divergence of pruned models, every method beside every other.

``python -m benchmarks.quality --zoo DIR`` prunes every folder under ``DIR/models`` in every way, on three draws of the
calibration text, and writes ``docs/quality/``: the runs (CSV), what they say (Markdown) and plots. A zoo's texts lie in
``DIR/text`` and are found by the model's name: ``llama-stories`` reads the stories. Without a zoo the bundled model is
pruned. ``--quick`` prints a small table and writes nothing. A run that was interrupted goes on where it stopped.
"""
