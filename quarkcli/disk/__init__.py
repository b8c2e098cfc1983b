"""Files: sources, shards, journal, written checkpoints."""
