"""The record of a run: typed events, checkpoints, and the card."""
