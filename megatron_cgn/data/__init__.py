"""Token sources: indexed datasets, their making, blending and loading."""
