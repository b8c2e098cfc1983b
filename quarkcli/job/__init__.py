"""Runs a job, from a recipe and a model to a checkpoint. `run` has its ten steps; it works in `partial_path`."""

from quarkcli.disk.writer import partial_path

__all__ = ["partial_path"]
