"""What a run of pruning or of training needs, from a config alone: operations, bytes, memory, least time."""
