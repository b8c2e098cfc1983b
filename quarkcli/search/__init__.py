"""The search for a mixed recipe: how much each group of weights loses in each scheme, and the best choice for a size."""
