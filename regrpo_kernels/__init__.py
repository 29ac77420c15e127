"""Fused kernels for reinforcement learning on language models, over packed variable-length sequences."""
