"""Vocabularies of a `cfg`, each resolved to one TensorSpec."""
