"""Faster parts for the local training of any Hugging Face causal LM, each held by a test to the plain result."""
