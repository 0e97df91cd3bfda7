"""Quality after pruning: perplexity and divergence of pruned models, for all methods side by side.

``python -m benchmarks.quality --zoo DIR`` prunes every folder under ``DIR/models`` with every method, on three samples
of the calibration text, and writes ``docs/quality/``: the runs (CSV), a summary (Markdown) and plots. A zoo's texts are
in ``DIR/text`` and are chosen by the model's name: ``llama-stories`` reads the stories. Without a zoo the bundled model
is pruned. ``--quick`` prints a small table and writes nothing. An interrupted run continues where it stopped.
"""
