"""Errors, checks, files, progress bars: used by all other packages. No JAX."""
