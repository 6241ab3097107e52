"""Certified robustness in JAX."""
