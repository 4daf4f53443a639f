"""The peers' side of each benchmark: each folder has its own environment, `.venv-PEER`, made by setup.py."""
