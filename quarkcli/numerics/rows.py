"""The number of rows that are solved at once on a CPU."""

VALUES = 1 << 23  # of a weight that are worked on at once
LEAST, MOST = 2048, 8192  # rows: fewer waste the time of a torch call, more leave a processor's cache


def cpu_rows(width: int) -> int:
    """Returns how many rows of `width` weights are solved at once on a CPU."""
    return max(LEAST, min(MOST, VALUES // max(1, width)))
