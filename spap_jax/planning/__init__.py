"""Requirements of a pruning run, from a model's config alone: operations, bytes, memory, and a lower bound on time."""
