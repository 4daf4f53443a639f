"""Runs in `.venv-nvflare`; its packages are in requirements.txt."""
