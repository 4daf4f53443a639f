"""Atoll trains, aligns, compresses and serves language models on data that cannot be pooled."""
