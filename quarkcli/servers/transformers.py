"""transformers 5.23: what it loads with no missing and no unexpected keys. The dialects say what that is."""

from __future__ import annotations

from quarkcli.servers._kernels import EVERY, Kernel
from quarkcli.servers.base import Loader


class Transformers(Loader):
    name = "transformers"
    title = "transformers 5.23"
    kernels_from = "what its libraries do on a CPU"
    kernels = (Kernel("*", "*", emulated=EVERY),)  # weights are decoded, inputs rounded in torch


SERVER = Transformers()
