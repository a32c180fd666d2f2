"""Processes, groups, seeds and reductions; the only package that reads Megatron's global state."""
