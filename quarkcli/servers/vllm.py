"""vLLM 0.32: what it loads. The dialects say what its classes take, and which keys it must find in a config.

Read in `vllm/model_executor/layers/quantization/`; most of it was loaded.
"""

from __future__ import annotations

from quarkcli.servers.base import Loader


class Vllm(Loader):
    name = "vllm"
    title = "vLLM 0.32"
    renames = True  # read in its class for Mixtral


SERVER = Vllm()
