"""Losses and nothing else: what to feed the model, and what its output is worth."""
