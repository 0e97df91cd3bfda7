"""The page of ``spap report``: reads reports of pruning runs, plots them, and writes one HTML file and PNGs."""
