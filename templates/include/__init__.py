"""CUDA headers that the kernel templates include; data, no code."""
