"""Devices: work on all of them at once, settings of their compilers, and the host."""
