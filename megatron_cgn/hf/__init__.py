"""Hugging Face directories: read, load into Megatron-Core models, export, convert."""
