"""What pruning needs, from a config alone: operations and memory of each program, and the least time."""
