"""Calibration: data sources become token batches, and batches become statistics per input site."""
