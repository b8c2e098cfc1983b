"""Hostile inputs at random, through the commands themselves: `python -m tests.fuzz --seed N --seconds 300`."""
