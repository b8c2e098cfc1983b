"""Reads recipes: YAML in, one ordered list of entries out. Torch-free."""
