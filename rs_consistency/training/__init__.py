"""A configuration becomes checkpoints: inputs, the step, the loop, and the folder of a run."""
