"""Megatron-CGN: turn a general base model into a domain model, on Megatron-Core."""

__version__ = "0.1.0"
