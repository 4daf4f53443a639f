"""Fleets: where clients run."""
