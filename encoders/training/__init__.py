"""Training: inputs, step, losses, loop, checkpoints and weight interpolation."""
