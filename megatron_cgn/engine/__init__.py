"""The engine: one training loop over Megatron-Core, for every stage."""
