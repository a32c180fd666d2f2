"""Configuration: frozen dataclasses, their rules, and loading them from Hydra."""
