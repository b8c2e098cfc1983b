"""transformers 5.23: what it loads with no missing and no unexpected keys. The dialects say what that is."""

from __future__ import annotations

from quarkcli.plan.model import Plan
from quarkcli.servers._kernels import EVERY, Kernel
from quarkcli.servers.base import Loader, Written


class Transformers(Loader):
    """It looks for one file, or for the files that an index names; vLLM takes all files there are."""

    name = "transformers"
    title = "transformers 5.23"
    kernels_from = "its libraries on a CPU"
    # Weights are decoded, inputs rounded in torch.
    kernels = (Kernel("*", "*", emulated=EVERY, read_in="compressed-tensors 0.20 and amd-quark 0.13"),)

    def _unserved(self, plan: Plan) -> list[str]:
        return []  # families are those that it has classes of

    def _faults(self, written: Written) -> list[str]:
        unnamed = (
            ["it finds no weights: there is neither an index nor one file model.safetensors"] if written.unnamed else []
        )
        return [*unnamed, *super()._faults(written)]


SERVER = Transformers()
