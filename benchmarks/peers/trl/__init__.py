"""Runs in `.venv-trl`; its packages are in requirements.txt."""
