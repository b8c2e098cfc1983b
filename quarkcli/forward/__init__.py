"""Runs a model block by block: rows, walk, taps, statistics."""
