"""Reads and writes files: sources, shards, journal, checkpoints."""
