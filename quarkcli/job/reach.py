"""Finds the parts that need data, how much tokens count there, and weights that the model's class does not load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from quarkcli.algorithms.base import Assignment, Solver
from quarkcli.errors import ConfigError, ModelError, some
from quarkcli.plan.model import Plan
from quarkcli.plan.sites import site_parts

PROBE_TOKENS = 128  # tokens of the rows that tell a block's error where one pass is enough


def takes_one_pass(plan: Plan, steps: Sequence[Assignment]) -> bool:
    """True when no step makes up for errors: every step is a transform, or a solver that asks for no statistics.

    They look at the source's hidden states, as SmoothQuant and AWQ do, which one pass both looks at and moves on.
    """
    return all(step.kind == "transform" or (step.kind == "solver" and not step.needs(plan)) for step in steps)


def balances(plan: Plan, steps: Sequence[Assignment]) -> dict[str, float]:
    """Returns by site the exponent by which frequent tokens count less in its second moments.

    Raises ConfigError where two solvers that share an activation ask for different ones.
    """
    found: dict[str, float] = {}
    for step in steps:
        if not isinstance(step.algorithm, Solver):
            continue
        own = step.algorithm.balance
        for site in (site for site, kinds in step.needs(plan).items() if "gram" in kinds):
            if found.setdefault(site, own) != own:
                raise ConfigError(
                    f"two solvers share the second moment of {site}, and ask for balance {found[site]:g} and {own:g}",
                    where="algorithm", hint="give both the same balance", kind="E-ALGORITHM-COMBINE",
                )  # fmt: skip
    return found


def probed_rows(seqlen: int) -> int:
    """Returns how many rows run again in the quantized block where one pass is enough."""
    return max(1, PROBE_TOKENS // seqlen)


def last_part(plan: Plan, needs: Mapping[str, set[str]]) -> int:
    """Returns the index of the last part that needs data; -1 when none does."""
    parts = site_parts(plan)
    return max((parts[site] for site in needs), default=-1)


def check_loaded(plan: Plan, needs: Mapping[str, set[str]], runner: Any) -> str | None:
    """Returns a warning about quantized weights that the model class does not load, None without any.

    Some files hold tensors that no forward reads, such as keys and values of blocks that share an earlier cache.
    Raises ModelError when a statistic is needed of an activation that none but such weights read.
    """
    unseen = [target.name for target in plan.quantized() if not runner.loads(target.view.tensor)]
    if not unseen:
        return None
    lost = set(unseen)
    sites = {name: site.members for name, site in plan.sites.items()}
    sites |= {target.output_site: (target.name,) for target in plan.quantized() if target.output_site is not None}
    for module in plan.attention.values():
        sites |= {f"{module.name}.{kind}": (module.k_proj,) for kind in module.slots}
    for site in needs:
        if lost.issuperset(sites[site]):
            raise ModelError(
                "calibration needs this layer input, and the model's class does not load the layers that read it",
                where=site,
                hint=f"use --exclude '{sites[site][0]}', or a scheme that needs no data for it",
                kind="E-CLASS-FOLLOW",
            )
    return (
        f"the model's class does not load {len(unseen)} of the quantized weights ({some(unseen, 4)}); they are "
        "calibrated with the weights that read the same input, and never run"
    )
