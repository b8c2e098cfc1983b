"""transformers 5.23: what it loads with no missing and no unexpected keys. The dialects say what that is."""

from __future__ import annotations

from quarkcli.servers._kernels import EVERY, Kernel
from quarkcli.servers.base import Loader


class Transformers(Loader):
    name = "transformers"
    title = "transformers 5.23"
    kernels_from = "its libraries on a CPU"
    # Weights are decoded, inputs rounded in torch.
    kernels = (Kernel("*", "*", emulated=EVERY, read_in="compressed-tensors 0.20 and amd-quark 0.13"),)


SERVER = Transformers()
