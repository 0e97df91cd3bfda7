"""A page of what pruning runs did: reads their reports, draws, and writes one HTML file and the plots as PNGs."""
