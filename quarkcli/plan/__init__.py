"""The plan: a recipe resolved against one model's headers. Torch-free."""
