"""Confidence bounds, sequential tests and intervals, in float64 on the host. No JAX."""
