"""Training: state, step, loop, checkpoints and the run folder."""
