"""What a model answers: generation on the layout it is trained on."""
