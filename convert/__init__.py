"""Checkpoints of SAM 2 and nnU-Net into this program: `python -m convert`, from a clone.

The only place besides the tests that may import PyTorch, and it does so late: safetensors are read
without it.
"""
