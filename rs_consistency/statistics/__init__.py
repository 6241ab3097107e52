"""Confidence bounds, sequential tests and intervals, in float64 on the host, and proofs in whole numbers. No JAX."""
