"""Measures the loss of a quantized model from the written files: perplexity, KL and top-1 agreement."""

from typing import Any


def judge(*given: Any) -> dict[str, Any]:
    """Does as `after.measure`, which needs torch: a `job.judging.Judge`."""
    from quarkcli.evaluation import after

    return after.measure(*given)
