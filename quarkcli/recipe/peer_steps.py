"""Says the algorithms of AMD Quark and NVIDIA ModelOpt in our words: names, parameters, defaults that differ from ours.

An imported file keeps what it says, and what its system does where it is silent: damping as given, no refinement, no
held-out rows. Torch-free.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from quarkcli.recipe.entries import SCALED, SLOTS
from quarkcli.recipe.search import START, STEP, STOP
from quarkcli.spec import MOST_RANGES

Parameters = dict[str, Any]
Row = tuple[str, Parameters]  # a step as a recipe lists it

_DOWN = "*down_proj.weight_quantizer"  # R4 turns what the down projection reads


@dataclass(frozen=True)
class Words:
    """One algorithm of a peer.

    name      ours
    renamed   field -> our parameter
    said      field -> our parameter for its value, where it is another
    usual     our parameter -> the value that holds where the file says nothing; given only where it is not ours
    left_out  field -> why it has no meaning here
    otherwise field -> value -> what the peer does with it, where that is not what it says
    """

    name: str
    renamed: Mapping[str, str] = field(default_factory=dict)
    said: Mapping[str, Callable[[Any], Parameters]] = field(default_factory=dict, kw_only=True)
    usual: Mapping[str, Any] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
    otherwise: Mapping[str, Mapping[Any, str]] = field(default_factory=dict, kw_only=True)

    def steps(self, given: Parameters) -> list[Row]:
        """Returns the steps for checked fields, without those that are left out."""
        kept: Parameters = {}
        for key, value in given.items():
            kept |= self.said[key](value) if key in self.said else {self.renamed.get(key, key): value}
        return [(self.name, {**self.usual, **kept})]

    def refused(self, given: Parameters) -> list[tuple[str, str]]:
        """Returns the fields that ask for what cannot be done here, with the reason."""
        return []


@dataclass(frozen=True)
class Turned(Words):
    """Quark's rotation: R1 and R2 are turned into the weights, R4 is a Hadamard at the inputs of down projections."""

    def steps(self, given: Parameters) -> list[Row]:
        r1, r2 = given.get("r1", True), given.get("r2", False)
        size = given.get("rotation_size")
        found: list[Row] = []
        if r1 or r2:
            block = {} if size is None else {"block": size}
            random = bool(given.get("random_r1" if r1 else "random_r2", False))
            found.append((self.name, {"r1": r1, "r2": r2, "random": random, **block}))
        if given.get("r4"):
            found.append(("hadamard", {SLOTS: [_DOWN], "block": "full" if size is None else size}))
        return found

    def refused(self, given: Parameters) -> list[tuple[str, str]]:
        return [(key, why) for key, why in _ONLINE.items() if given.get(key)]


@dataclass(frozen=True)
class Swept(Words):
    """ModelOpt's mse: ranges from `start_multiplier` times amax on, `step_size` apart; `recipe.search` takes it on."""

    def refused(self, given: Parameters) -> list[tuple[str, str]]:
        start, step = given.get("start_multiplier", START), given.get("step_size", STEP)
        if start >= given.get("stop_multiplier", STOP):
            return [("stop_multiplier", f"it must be above start_multiplier, {start:g}")]
        if (1 - start) / step >= MOST_RANGES:
            return [("step_size", f"it asks for more than {MOST_RANGES} ranges; write a larger one")]
        return []


_ONLINE = {
    "r3": "no checkpoint format can say that queries and keys are rotated while the model runs",
    "online_r1_rotation": "R1 becomes part of the weights; the algorithm hadamard rotates inputs while the model runs",
}
_FAMILY_BLOCKS = "quark knows the blocks from the model family"
_FAMILY_READS = "quark knows from the model family which modules of a block read one activation"
_FAMILY_TURNS = "quark knows from the model family which linears read and write the residual stream"
_OWN_BLOCKS = {"block_size": "quark chooses the blocks of columns itself, with the same result"}
_PLACED = {"model_decoder_layers": _FAMILY_BLOCKS, "inside_layer_modules": _FAMILY_READS}
_ROOTED = {"RMSE": "quark takes RMSE as the root of the mean square; AMD Quark takes the mean root of the magnitude"}
_AS_GIVEN = {"refine": "off", "holdout": 0}
# AMD Quark solves the weights of a block one after the other, each on what the quantized ones before it hand on.
_IN_TURN = {**_AS_GIVEN, "true_sequential": True}
_COLUMNS = {"damp_percent": "damp", "desc_act": "act_order"}

QUARK: dict[str, Words] = {
    "awq": Words("awq", left_out=_PLACED),
    "gptq": Words("gptq", _COLUMNS, {"damp": 0.01, **_IN_TURN}, _PLACED | _OWN_BLOCKS),
    "gptaq": Words(
        "gptaq", {**_COLUMNS, "alpha": "strength"}, {"damp": 0.01, "strength": 0.25, **_IN_TURN}, _PLACED | _OWN_BLOCKS
    ),
    "qronos": Words(
        "qronos", {"alpha": "damp", "desc_act": "act_order"},
        {"damp": 1e-3, "damp_of": "largest", "strength": 1.0, **_IN_TURN},
        _PLACED | _OWN_BLOCKS | {"beta": "quark does not need it: memory does not grow"},
    ),
    "smoothquant": Words("smoothquant", usual={"alpha": 1.0}, left_out=_PLACED),
    "autosmoothquant": Words("autosmoothquant", left_out=_PLACED, otherwise={"compute_scale_loss": _ROOTED}),
    "rotation": Turned(
        "rotation",
        left_out={
            **dict.fromkeys(("backbone", "v_proj", "o_proj", "self_attn", "mlp", SCALED), _FAMILY_TURNS),
            "online_config": "it concerns rotations while the model runs",
            **_PLACED,
        },
    ),
    "autoround": Words(
        "autoround", {"enable_minmax_tuning": "minmax", "batch_size": "batch"}, {"lr": 1 / 200, "minmax_lr": 1 / 200},
        _PLACED,
    ),
}  # fmt: skip


def _grid(alpha_step: float) -> Parameters:
    """Returns the number of exponents between 0 and 1 for ModelOpt's step from one to the next."""
    return {"n_grid": max(1, round(1 / alpha_step))}


_AWQ_SCALES = {"alpha_step": _grid}
_TENTHS = {"n_grid": 10}
_AWQ_STEERS = {
    "max_co_batch_size": "it changes only the use of memory",
    "max_tokens_per_batch": "quark samples all rows evenly",
}
_SCALES_NEAR = "quark tries scales near the usual one: codes of e4m3, exponents of e8m0, factors of plain ones"
MODELOPT: dict[str, Words] = {
    "mse": Swept("mse"),
    "awq_lite": Words("awq", usual={"clip": "off", **_TENTHS}, said=_AWQ_SCALES, left_out=_AWQ_STEERS),
    "awq_clip": Words("awq", usual={"scales": False, "clip": "on"}, left_out=_AWQ_STEERS),
    "awq_full": Words("awq", usual={"clip": "on", **_TENTHS}, said=_AWQ_SCALES, left_out=_AWQ_STEERS),
    "local_hessian": Words(
        "rtn",
        usual={"scale_search": True},
        left_out={
            **dict.fromkeys(("step_size", "start_multiplier", "stop_multiplier", "fp8_scale_sweep"), _SCALES_NEAR),
            "block_size": "quark takes the blocks that share a scale",
        },
    ),
    "gptq": Words("gptq", {"perc_damp": "damp"}, {"damp": 0.01, **_AS_GIVEN}, _OWN_BLOCKS),
    "smoothquant": Words("smoothquant", usual={"alpha": 1.0}),
}
