"""Transforms: what happens to an update between the client's work and the server's sum."""
