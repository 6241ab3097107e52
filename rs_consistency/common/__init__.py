"""What every other package uses: errors, checks, files, progress. No JAX."""
