"""Finds inputs of linears that a server multiplies by a block Hadamard while the model runs. Torch-free."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from quarkcli.errors import ConfigError
from quarkcli.plan.model import Plan

LARGEST = 1 << 15  # values of one block, in the kernels that there are


def check(plan: Plan) -> None:
    """Raises ConfigError unless every input has one block, that fits its width and all that read the input."""
    by: dict[str, str] = {}
    for key, changes in plan.changes.items():
        for name, block in changes.online.items():
            if name in by:
                raise ConfigError(
                    f"{by[name]} and {key} both rotate its input",
                    where=name,
                    hint="give each of them 'slots' (the weights that it works on) of its own",
                    kind="E-ALGORITHM-COMBINE",
                )
            by[name] = key
            width = plan.targets[name].shape[1]
            assert block > 1 and block & (block - 1) == 0 and width % block == 0, (name, width, block)
    _check_sites(plan)


def _check_sites(plan: Plan) -> None:
    """Raises ConfigError where weights that read one activation are to be turned, and others not, or otherwise."""
    online = plan.online
    for site in plan.sites.values() if online else ():
        quantized = [name for name in site.members if plan.targets[name].weight is not None]
        blocks = {online.get(name): name for name in quantized}
        if len(blocks) > 1:
            one, other = list(blocks.items())[:2]
            raise ConfigError(
                f"it has {_block(one[0])}, and {other[1]} with the same input has {_block(other[0])}; servers "
                "rotate an input once for all layers that read it",
                where=one[1],
                hint="name all of them or none in the algorithm's 'slots'",
                kind="E-ALGORITHM-COMBINE",
            )


def _block(block: int | None) -> str:
    return "no Hadamard" if block is None else f"a Hadamard of {block}"


def sentences(online: Mapping[str, int]) -> list[str]:
    """Returns online operations (weight -> size of the Hadamard blocks) in words, one sentence for each size."""
    counts = Counter(online.values())
    return [f"a Hadamard of {block} rotates the inputs of {count} layers" for block, count in counts.items()]
