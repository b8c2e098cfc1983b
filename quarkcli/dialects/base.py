"""Defines the contracts of dialects: readers and writers. Their facts (refusals, names, sizes, config) are torch-free.

A member of the folder offers `WRITER`, `READER`, or both: instances of classes that follow `Writer` and `Reader`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from quarkcli.dialects import _vllm_names as vllm_names
from quarkcli.dialects._kinds import Kinds, weight_kind
from quarkcli.family import HeaderLike, WeightView
from quarkcli.plan.model import Attention, Plan, QuantizedTarget, Target
from quarkcli.plan.online import sentences
from quarkcli.spec import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

    from quarkcli.numerics.quantize import Quantized


class TensorInfo(NamedTuple):
    """Name, safetensors dtype (`U8`, `F8_E4M3`, `I32`, `BF16`, `F32` ...) and shape of a tensor to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class StoredTarget:
    """One quantized weight found in a checkpoint.

    shape    (out, in) of the weight it decodes to
    tensors  the file tensors it is made of, in the checkpoint's names
    output   spec of the module's output, None when it is not quantized
    bias     spec of its bias, None when the bias is an ordinary tensor
    places   name in `own` -> its place in a file tensor that holds more than this weight, such as one for all experts
    columns  the tensor with what every input is multiplied by while the model runs, None: they are read as they are
    """

    name: str
    weight: TensorSpec
    input: TensorSpec | None
    shape: tuple[int, int]
    tensors: tuple[str, ...]
    output: TensorSpec | None = None
    bias: TensorSpec | None = None
    places: Mapping[str, WeightView] = field(default_factory=dict)
    columns: str | None = None

    @property
    def is_static(self) -> bool:
        """True when its input or its output has a stored static scale."""
        return any(spec is not None and spec.is_static for spec in (self.input, self.output))

    def own(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns its tensors by their names within the module, and its shares of larger ones by those in `places`."""
        shared = {place.tensor for place in self.places.values()}
        whole = {name.rpartition(".")[2]: tensors[name] for name in self.tensors if name not in shared}
        return whole | {name: place.of(tensors[place.tensor]) for name, place in self.places.items()}


@dataclass
class Decoded:
    """The contents of a target's tensors.

    weight         codes and scales as they were before packing
    input, output  static scales (multipliers, float32 []), None when there is none
    bias           codes and scales of a quantized bias [1, out]
    """

    weight: Quantized
    input: Tensor | None = None
    output: Tensor | None = None
    bias: Quantized | None = None


@dataclass(frozen=True)
class StoredAttention:
    """Attention slots found in a checkpoint: `specs` and the names of scalar `scales`, both by kind (q, k, v, p).

    Scales without specs are of a cache that nothing here runs.
    """

    name: str
    specs: dict[str, TensorSpec]
    scales: dict[str, str]


@dataclass
class StoredView:
    """The contents of a quantized checkpoint; every tensor not named here is an ordinary one.

    online    weight -> size of the block Hadamard that its input is multiplied by while the model runs
    matrices  tensors that hold such a Hadamard
    absent    scales of inputs that the config speaks of and the files do not hold; codes are read without them
    """

    targets: dict[str, StoredTarget] = field(default_factory=dict)
    attention: dict[str, StoredAttention] = field(default_factory=dict)
    online: dict[str, int] = field(default_factory=dict)
    matrices: frozenset[str] = frozenset()
    absent: tuple[str, ...] = ()


CONFIG_FILE, CONFIG_KEY = "config.json", "quantization_config"
ANY = "any"  # kind of weight


class Reader:
    """Reads the checkpoints of one on-disk convention.

    quant_method   the value that their `quantization_config` has under this key
    divisors       the leaves of scales that are stored as their inverse
    beside         files beside config.json that may describe a checkpoint in its place, the first that is there
    lists          keys of a config that hold the names of modules which are left out
    lists_parts    loaders look for their entries anywhere in a name, so that `mlp.gate` leaves out `mlp.gate_proj` too
    lists_tied     a head that shares the embedding's weight, and is in no file, must be listed
    unlisted       roles of modules that loaders leave as they are, listed or not
    head_key       key of a config that says whether the head is quantized; without it: it is not
    """

    name: ClassVar[str]
    quant_method: ClassVar[str]
    divisors: ClassVar[frozenset[str]] = frozenset()
    beside: ClassVar[tuple[str, ...]] = ()
    lists: ClassVar[tuple[str, ...]] = ()
    lists_parts: ClassVar[bool] = False
    lists_tied: ClassVar[bool] = True
    unlisted: ClassVar[frozenset[str]] = frozenset({"embedding"})
    head_key: ClassVar[str] = ""

    def matches(self, config: Mapping[str, Any], headers: Mapping[str, HeaderLike]) -> bool:
        """True when a checkpoint is one of these, by its `quantization_config` ({} without one) and headers."""
        return bool(config.get("quant_method") == self.quant_method)

    def packs(self, headers: Mapping[str, HeaderLike]) -> bool:
        """True when tensors look like its own, whatever a config says: asked before a file in `beside` is believed."""
        return False

    def view(self, config: Mapping[str, Any], headers: Mapping[str, HeaderLike]) -> StoredView:
        """Returns the view of a checkpoint, from its `quantization_config` and headers. Raises ModelError."""
        raise AssertionError("a reader says what a checkpoint holds")

    def left_out(self, config: Mapping[str, Any]) -> dict[str, list[str]]:
        """Returns the lists of modules that a `quantization_config` leaves out, by their keys."""
        return {key: [str(entry) for entry in config[key]] for key in self.lists if isinstance(config.get(key), list)}

    def untouched(self, config: Mapping[str, Any], modules: Iterable[str]) -> set[str]:
        """Returns those of these modules that a `quantization_config` gives no scheme, whatever it lists as left out.

        By default its scheme is for every linear module.
        """
        return set()

    def decode(self, stored: StoredTarget, tensors: Mapping[str, Tensor]) -> Decoded:
        """Returns codes and scales as they were before packing, and the static scales."""
        raise AssertionError("a reader decodes")

    def decode_attention(self, stored: StoredAttention, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns scale multipliers (float32 []) by kind."""
        return {kind: tensors[name].float().reshape(()) for kind, name in stored.scales.items()}


class Key(NamedTuple):
    """A key that a server must find in a config, dots between the steps, and its kind; `why`: what happens without."""

    path: str
    kind: type
    why: str

    def lacks(self, config: Mapping[str, Any]) -> bool:
        value: Any = config
        for step in self.path.split("."):
            value = value.get(step) if isinstance(value, Mapping) else None
        return not isinstance(value, self.kind)


class Classes(NamedTuple):
    """The classes of a server of which only the source was read: what they take.

    linears, experts  kinds of weights and inputs
    read_in           the file and the class or function of its source
    heads             whether a quantized head has a class
    faults            returns what else it does not load of a plan under a config, one sentence each
    """

    linears: frozenset[Kinds]
    experts: frozenset[Kinds]
    read_in: str
    heads: bool = False
    faults: Callable[[Plan, Mapping[str, Any]], list[str]] = lambda plan, config: []


# Returns what is wrong with a `quantization_config`, one sentence each; the plan that it holds where there is one.
ConfigCheck = Callable[[Mapping[str, Any], Plan | None], list[str]]
# Returns what the entries of its lists lack; true: entries stand for every name that they are a part of.
NamesCheck = Callable[[Plan, Iterable[str], bool], list[str]]


class Bar(NamedTuple):
    """A row of what a server refuses in one dialect only: formats (globs on their names), and generations of GPUs."""

    weight: str
    read: str
    where: str
    why: str


class Writer:
    """Writes checkpoints of one on-disk convention. By default it holds every weight, and no quantized attention.

    reader        reads what it writes; None: nothing here does, so that nothing can be calibrated on the way
    preferences   kind of weight, as `_kinds.weight_kind` calls it, or ANY for all others -> see `preference`
    demands       server -> keys without which its class for this dialect is not made, or fails later
    no_globs      server -> the list in which it takes globs for names
    faults        server -> what else it does not load under a config
    own_names     server -> which of the names that it has for modules the lists of a config (`Reader.lists`) lack
    classes       server of which only the source was read -> what its classes for this dialect take
    bars          server -> the generations of GPUs on which it refuses this dialect, and runs the format in others
    """

    name: ClassVar[str]
    reader: ClassVar[Reader | None] = None
    preferences: ClassVar[Mapping[str, int]] = {}
    demands: ClassVar[Mapping[str, tuple[Key, ...]]] = {}
    no_globs: ClassVar[Mapping[str, str]] = {}
    faults: ClassVar[Mapping[str, ConfigCheck]] = {}
    own_names: ClassVar[Mapping[str, NamesCheck]] = {"vllm": vllm_names.unsaid}
    classes: ClassVar[Mapping[str, Classes]] = {}
    bars: ClassVar[Mapping[str, tuple[Bar, ...]]] = {}

    def refusals(self, plan: Plan) -> list[str]:
        """Returns the reasons this dialect cannot hold the plan, one sentence each; empty when it can."""
        active = [attention for attention in plan.attention.values() if attention.specs]
        return [f"{attention.name}: {self.name} has no place for quantized attention" for attention in active[:1]]

    def online_refusals(self, plan: Plan) -> list[str]:
        """Returns the reasons this dialect cannot say what the plan does at run time; empty when it can."""
        what = f"{self.name} has no place for inputs that are rotated while the model runs"
        return [f"{what}: {which}" for which in sentences(plan.online)]

    def loaders(self, plan: Plan) -> set[str]:
        """Returns those of `vllm`, `transformers` that load what this dialect would write for the plan."""
        return set()

    def caveat(self, plan: Plan) -> str:
        """Returns a sentence about releases of a loader that treat it otherwise; empty when all do the same."""
        return ""

    def config_faults(self, config: Mapping[str, Any], server: str, plan: Plan | None = None) -> list[str]:
        """Returns what is wrong with a `quantization_config` of this dialect for a server, and this plan."""
        found = [
            f"quantization_config has no {key.path} ({key.kind.__name__}): {key.why}"
            for key in self.demands.get(server, ())
            if key.lacks(config)
        ]
        name = self.no_globs.get(server, "")
        globs = [text for text in config.get(name) or () if isinstance(text, str) and _is_glob(text)]
        found += [f"{name} has patterns, and servers read them as names: {', '.join(globs[:3])}"] if globs else []
        if server in self.faults:
            found += self.faults[server](config, plan)
        if server not in self.own_names or plan is None or self.reader is None:
            return found
        entries = [entry for listed in self.reader.left_out(config).values() for entry in listed]
        return found + self.own_names[server](plan, entries, self.reader.lists_parts)

    def cache_fault(self, plan: Plan, server: str) -> str:
        """Returns why a server does not find the scales of the cache; empty when it does, or that is not known."""
        return ""

    def preference(self, plan: Plan) -> int:
        """Returns the rank that `--dialect auto` gives it: the least over the plan's kinds of weights.

        The highest is taken among dialects that the same programs load; one of 0 only where no other holds the plan.
        """
        usual = self.preferences.get(ANY, 0)
        kinds = {weight_kind(run[0].weight) for run in plan.quantized_alike()}
        return min((self.preferences.get(kind or ANY, usual) for kind in kinds), default=usual)

    def infos(self, target: QuantizedTarget) -> list[TensorInfo]:
        """Returns the tensors that replace the target's weight, exactly as `tensors` will return them."""
        raise AssertionError("a writer names the tensors of a weight")

    def places(self, target: Target) -> Mapping[str, WeightView]:
        """Returns those of `infos` that are pieces of larger tensors in the files, by name, and their places there."""
        return {}

    def tensors(
        self, target: QuantizedTarget, quantized: Quantized, static: Mapping[str, Tensor], bias: Quantized | None = None
    ) -> dict[str, Tensor]:
        """Returns packed tensors by file name.

        static   scales (float32 [], from `static_scale`) by slot kind: `input`, `output`; those that are stored
        bias     codes of the bias [1, out] where its slot is quantized
        """
        raise AssertionError("a writer packs")

    def joined(self, attention: Attention) -> frozenset[str]:
        """Returns the kinds (q, k, v) that one stored scale is for: those that one linear makes. By default none is."""
        return frozenset()

    def attention_infos(self, attention: Attention) -> list[TensorInfo]:
        """Returns the tensors added for the enabled attention slots."""
        return []

    def attention_tensors(self, attention: Attention, scales: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns scale tensors by file name from multipliers (amax / 448) by kind."""
        return {}

    def online_infos(self, plan: Plan, part: int) -> list[TensorInfo]:
        """Returns the tensors that a part gets for what is done at run time."""
        return []

    def online_tensors(self, plan: Plan, part: int) -> dict[str, Tensor]:
        """Returns the tensors of `online_infos` by file name."""
        return {}

    def config(self, plan: Plan) -> dict[str, Any]:
        """Returns the `quantization_config` object."""
        raise AssertionError("a writer describes what it wrote")

    def files(self, plan: Plan) -> dict[str, dict[str, Any]]:
        """Returns every JSON file that describes the checkpoint, by path; of config.json, the keys it sets there."""
        config = self.config(plan)
        return {CONFIG_FILE: {CONFIG_KEY: config}, f"{CONFIG_KEY}.json": config}


def _is_glob(text: str) -> bool:
    """True for a glob that would have to match: a head is never quantized where it is not named."""
    return "*" in text and not text.startswith("re:") and not text.endswith("lm_head")
