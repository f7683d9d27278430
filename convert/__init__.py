"""Checkpoints of SAM 2 and nnU-Net into this program and back: the work of `rfmedsam2 convert`.

Installed as `rfmedsam2_jax.convert`; in a clone also `python -m convert`. The only place besides
the tests that may import PyTorch, and it does so late: to write its files and to compare with its
networks. Files are read without it.
"""
