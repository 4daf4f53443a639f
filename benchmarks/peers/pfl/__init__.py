"""Runs in `.venv-pfl`; its packages are in requirements.txt."""
