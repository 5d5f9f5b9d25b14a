"""The operations in plain torch, on any device: what CPU tensors get, and what tests compare kernels with."""
