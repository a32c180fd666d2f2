"""Tokenizers: wrapping, chat templates and vocabulary extension."""
