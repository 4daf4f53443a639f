"""Runs in `.venv-flwr`; its packages are in requirements.txt."""
