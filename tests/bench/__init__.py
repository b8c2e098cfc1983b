"""Measurements: loss tables, memory, speed. `make bench` runs all; nothing here is part of the test suite."""
