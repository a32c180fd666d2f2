"""Extending the vocabulary of a tokenizer and its model: worth, surgery and proof."""
