"""What quark writes, pinned by its hashes. See `table.py` (data-free, committed) and `compare.py` (calibrated)."""
