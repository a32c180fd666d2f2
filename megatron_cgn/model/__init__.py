"""The model: architecture, native layers, and building a Megatron-Core `GPTModel`."""
