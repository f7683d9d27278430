"""What a compiled program costs, read from XLA's text, and the TPU slices that it may be for."""
