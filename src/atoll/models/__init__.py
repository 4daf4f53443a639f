"""Models: loading, what trains and travels, and faster parts for local training."""
