"""Online Hadamards: the server turns inputs of quantized linears in blocks, and the weights are turned beforehand.

Every run of `block` input features is multiplied by Sylvester's matrix / sqrt(block), and so are the columns of the
weight, which leaves the product as it is. An outlier is spread over its block: codes of mxfp4, whose block of 32 has
one exponent, fit better; those of nvfp4 fit worse when the turned block is no wider than its own of 16, since the
outlier then spoils what it would have spoiled alone. With `slots` on the down projections this is R4 of QuaRot and
SpinQuant. Servers hold it in part, which the dialects say; no checkpoint can say it of q and k (R3).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from quarkcli.algorithms.base import Transform
from quarkcli.errors import ConfigError
from quarkcli.plan.model import Changes, Plan, QuantizedTarget
from quarkcli.plan.online import LARGEST

AUTO, FULL = "auto", "full"
USUAL = 128  # where the format has no block of its own that gains from being turned alone


class Hadamard(Transform):
    """The online block Hadamard.

    block: a power of two that divides the width; auto: 32 for formats of blocks of 32, else 128 or what divides the
    width; full: the whole width, or the largest power of two that divides it
    r3: of queries and keys behind RoPE as well, which is refused: no server does it
    """

    name = "hadamard"
    parameters: ClassVar[Mapping[str, Any]] = {"block": AUTO, "r3": False}

    def __init__(self, block: int | str, r3: bool) -> None:
        if r3 is not False:
            raise ConfigError(
                "hadamard r3 is not supported: no server rotates queries and keys while the model runs",
                where="algorithm",
                hint="leave r3 out; hadamard can rotate inputs of linear layers, and 'rotation' (r2) the values "
                "of attention",
                kind="E-ALGORITHM-FORMAT",
            )
        whole = isinstance(block, int) and not isinstance(block, bool)
        if block not in (AUTO, FULL) and not (whole and _is_power(int(block)) and 2 <= int(block) <= LARGEST):
            raise ConfigError(
                f"hadamard block must be auto, full, or a power of two from 2 to {LARGEST}, not {block!r}",
                where="algorithm",
                kind="E-ALGORITHM-PARAMETER",
            )
        self.block = block

    def check(self, plan: Plan) -> None:
        """Raises ConfigError for a block that does not fit, and when nothing can be turned."""
        chosen, left = _parted(plan)
        for target in chosen:
            self._check_block(target)
        if not chosen and left:
            reasons = "; ".join(f"{names[0]}{_more(names)}: {why}" for why, names in left.items())
            raise ConfigError(
                f"hadamard finds no linear layer whose input it can rotate: {reasons}",
                where="algorithm",
                kind="E-ALGORITHM-IDLE",
            )
        for why, names in left.items() if chosen else ():
            plan.warnings.append(f"hadamard leaves out {names[0]}{_more(names)}: {why}")

    def memory(self, plan: Plan) -> int:
        """Returns the bytes of the largest weight in float32, turned, and on its way there."""
        chosen, _ = _parted(plan)
        return 3 * 4 * max((target.numel for target in chosen), default=0)

    def changes(self, plan: Plan) -> Changes:
        blocks = self.online(plan)
        return Changes(frozenset(plan.targets[name].view.tensor for name in blocks), online=blocks)

    def online(self, plan: Plan) -> dict[str, int]:
        chosen, _ = _parted(plan)
        return {target.name: self._block_of(target) for target in chosen}

    def _block_of(self, target: QuantizedTarget) -> int:
        width = target.shape[1]
        most = min(width & -width, LARGEST)
        if self.block == FULL:
            return most
        if self.block == AUTO:
            return min(most, _shared_exponents(target) or USUAL)
        return int(self.block)

    def _check_block(self, target: QuantizedTarget) -> None:
        """Raises ConfigError when the block does not divide the width, or spoils the format's own block."""
        width, block = target.shape[1], self._block_of(target)
        if block < 2 or width % block:
            fits = width & -width
            raise ConfigError(
                f"a block of {block} does not divide {width} input features",
                where=target.name,
                hint=f"write block: {fits}, or full"
                if fits > 1
                else "leave it out of 'slots' (the weights that it works on)",
                kind="E-ALGORITHM-FORMAT",
            )
        own = _two_level_group(target)
        if own is not None and block <= own:
            raise ConfigError(
                f"a Hadamard of {block} inside groups of {own} of {target.weight.describe()} costs accuracy: an "
                "outlier harms its group either way",
                where=target.name,
                hint="write block: 128, or use smoothquant, permutation or rotation, which run on every server",
                kind="E-ALGORITHM-FORMAT",
            )


def _parted(plan: Plan) -> tuple[list[QuantizedTarget], dict[str, list[str]]]:
    """Returns the weights whose inputs are turned, and the names of the others by reason.

    Those that read one activation are turned together, or not at all.
    """
    reasons = {target.name: _unturned(target) for target in plan.quantized()}
    barred = {target.site for target in plan.quantized() if reasons[target.name] is not None}
    chosen: list[QuantizedTarget] = []
    left: dict[str, list[str]] = {}
    for target in plan.quantized():
        why = reasons[target.name]
        if why is None and target.site in barred:
            why = "another layer with the same input is left out"
        if why is None:
            chosen.append(target)
        else:
            left.setdefault(why, []).append(target.name)
    return chosen, left


def _unturned(target: QuantizedTarget) -> str | None:
    """Returns the reason why the input of a weight is not turned, None when it can be."""
    if target.is_embedding:
        return "an embedding reads token numbers"
    if target.site is None:
        return "text does not reach it"
    if target.expert is not None:
        return "servers run routed experts together and rotate only inputs of single linear layers"
    if target.role == "head":
        return "servers do not rotate the input of the head"
    if target.role == "router":
        return "servers do not rotate the input of a router"
    if target.bias is not None:
        return "vLLM 0.32 stops at a linear layer with a bias and a rotated input"
    return None


def _two_level_group(target: QuantizedTarget) -> int | None:
    """Returns the size of groups whose scales lie under one of the tensor, of the weight or its input."""
    for spec in (target.weight, target.input):
        if spec is not None and spec.is_two_level:
            return spec.group_size
    return None


def _shared_exponents(target: QuantizedTarget) -> int | None:
    """Returns the size of the weight's groups where each shares a power of two, else None."""
    scale = target.weight.scale
    return target.weight.group_size if scale is not None and scale.dtype == "e8m0" else None


def _is_power(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


ALGORITHM = Hadamard
