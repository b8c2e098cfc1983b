"""Resolves a recipe against one model's headers into a plan. Torch-free."""
