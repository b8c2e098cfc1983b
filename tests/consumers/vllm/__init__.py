"""What vLLM's CPU build makes of checkpoints that the job wrote: `make test-consumers`.

`worker.py` and `standins.py` run in vLLM's own environment, which has no quark; the rest runs in ours.
"""
