"""Several devices and several processes: the mesh, placement of arrays on it, and what processes tell each other."""
