"""Experiment configurations; every file has a `get_config`."""
