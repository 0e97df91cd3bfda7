"""What a run of pruning will need, from a model's config alone: operations, bytes, memory, and the least time."""
