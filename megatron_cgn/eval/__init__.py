"""Judging a model: numbers that compare models, also with different vocabularies."""
