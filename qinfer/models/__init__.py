"""Models: what they are (config), where their tensors lie (architectures) and how they run (decoder)."""
