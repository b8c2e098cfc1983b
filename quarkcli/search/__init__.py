"""Searches for a mixed recipe: what each group of weights loses in each scheme, and the best choice for a size."""
