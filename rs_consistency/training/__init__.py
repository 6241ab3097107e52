"""Training: from a configuration to checkpoints, by way of inputs, step, loop, and the folder of a run."""
