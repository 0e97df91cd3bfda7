"""The peers' channel criteria, on the same second moments as our own."""
