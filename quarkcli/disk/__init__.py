"""What is read from and written to disk: sources, shards, journal, written checkpoints."""
