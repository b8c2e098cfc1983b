"""vLLM 0.32: what it loads. The dialects say what its classes take, and which keys it must find in a config.

Read in `vllm/model_executor/layers/quantization/`; most of it was loaded.
"""

from __future__ import annotations

from quarkcli.servers.base import Loader, Written


class Vllm(Loader):
    name = "vllm"
    title = "vLLM 0.32"

    def misnamed(self, written: Written) -> list[str]:
        """Its class for Mixtral knows both names; that of gpt-oss, whose biases are one tensor, was tried: not so."""
        return super().misnamed(written) if written.renamed.endswith(".bias") else []


SERVER = Vllm()
