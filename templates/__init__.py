"""Kernel templates (Jinja) and their CUDA headers; data, no code."""
