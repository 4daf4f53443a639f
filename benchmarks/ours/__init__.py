"""Our side of each benchmark: what runs in Atoll's own environment."""
