"""Reads a quantized checkpoint back from its config and headers alone, in the source's names and shapes.

The model class runs on file tensors in source form. A quantized weight is decoded to its `.weight`; experts that a
family stores fused are put together again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from quarkcli import dialects, family
from quarkcli.dialects.base import Decoded, StoredTarget, StoredView
from quarkcli.disk.source import Source
from quarkcli.errors import ModelError
from quarkcli.family import FamilyModel, Layout, WeightView, fused_shape, fused_views
from quarkcli.forward.activations import ActivationQuantizer, AttentionQuantizer
from quarkcli.plan.model import Plan
from quarkcli.plan.stored import Specs, of_stored

if TYPE_CHECKING:
    from torch import Tensor

_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


@dataclass(frozen=True)
class LogicalHeader:
    """dtype and shape of a tensor in source form."""

    dtype: str
    shape: tuple[int, ...]


@dataclass
class _Recipe:
    """The recipe of a tensor in source form: copied, decoded (a weight or a bias), or put together from views."""

    copy: str | None = None
    bias: str | None = None  # module name
    pieces: list[tuple[WeightView | None, str]] = field(default_factory=list)  # (place, weight name)
    rows: list[list[str]] = field(default_factory=list)  # of each expert, the tensors whose values make its row
    in_turn: bool = False  # value by value, not one tensor after the other


class Checkpoint:
    """A directory with a `quantization_config` that one of our dialects reads; or an unquantized one as it is.

    renamed   tensors whose names are not those that the model was published with -> those names; several biases of
              experts may be one tensor there
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        config = family.quantization(source.config)
        if not config:
            family.check_codes(source.headers)
        self.reader = dialects.reader(config, source.headers)
        self.view = self.reader.view(config, source.headers) if self.reader else StoredView()
        self._held: dict[str, Tensor] = {}  # tensors that hold many targets: those of the last one decoded
        self._recipes: dict[str, _Recipe] = {}
        self.headers: dict[str, LogicalHeader] = {}
        self.dtype = _model_dtype(source.config, [source.headers[name].dtype for name in self.copied()])
        self._lay_out()
        self.family_name, self.family, self.inferred = family.for_checkpoint(source.config, self.headers)
        self.renamed = family.published_experts(self.family, self.headers)
        self._rename()
        if self.quantized and self.family.experts and not self.family.experts.singles:
            self._fuse(self.family)

    @property
    def transposed_experts(self) -> frozenset[str]:
        """Returns the fused tensors stored as they are whose square matrices lie [in, out], unseen by their shape."""
        return family.hidden_transpositions(self.family, self.source.config, self.source.headers)

    @property
    def quantized(self) -> bool:
        return self.reader is not None

    @cached_property
    def layout(self) -> Layout:
        """Returns the family applied to the tensors in source form. Raises ModelError where they do not fit."""
        return self._laid_out(self.headers)

    @cached_property
    def singly(self) -> Layout:
        """Does as `layout`, with every quantized weight by itself, whether the source form has it fused or not."""
        stored = self.view.targets.values()
        return self._laid_out({**self.headers, **{f"{s.name}.weight": LogicalHeader("BF16", s.shape) for s in stored}})

    def _laid_out(self, headers: dict[str, LogicalHeader]) -> Layout:
        return family.lay_out(self.family_name, self.family, self.inferred, self.source.config, headers)

    def plan(self, layout: Layout) -> Plan:
        """Returns the plan that holds what is stored, and changes nothing. Raises ModelError, see `of_stored`."""
        assert self.reader is not None
        weights: dict[str, Specs] = {
            stored.name: (stored.weight, stored.input, stored.output, stored.bias)
            for stored in self.view.targets.values()
        }
        attention = {stored.name: stored.specs for stored in self.view.attention.values()}
        return of_stored(self.reader.name, layout, weights, attention, self.view.online)

    @property
    def by_offset(self) -> bool:
        """True for safetensors files."""
        return self.source.by_offset

    @property
    def unlisted(self) -> list[str]:
        """Returns the tensors in source form that are made of one that the index does not name."""
        lost = set(self.source.unlisted)
        copies = [name for name, recipe in self._recipes.items() if recipe.copy in lost]
        decoded = (name for name, stored in self.view.targets.items() if not lost.isdisjoint(stored.tensors))
        return copies + [f"{name}.weight" for name in decoded] if lost else []

    def copied(self) -> list[str]:
        """Returns the tensors that are stored in source form, not packed, in file order."""
        packed = {name for stored in self.view.targets.values() for name in stored.tensors}
        packed |= {name for stored in self.view.attention.values() for name in stored.scales.values()}
        packed |= self.view.matrices
        return [name for name in self.source.headers if name not in packed]

    def stored(self, names: Iterable[str]) -> list[str]:
        """Returns the tensors of the files that these, in source form, are made of."""
        return list(dict.fromkeys(tensor for name in names for tensor in self._stored(self._recipes[name])))

    def _stored(self, recipe: _Recipe) -> Iterator[str]:
        if recipe.copy is not None:
            yield recipe.copy
        for module in [recipe.bias] if recipe.bias is not None else [name for _, name in recipe.pieces]:
            found = self.view.targets.get(module)
            yield from found.tensors if found is not None else [f"{module}.weight"]

    def read_many(self, names: Iterable[str], dtype: Any = None) -> dict[str, Tensor]:
        """Returns tensors in source form; decoded ones in `dtype` (None: the model's), one weight at a time."""
        return {name: self._read(name, dtype) for name in names}

    def _read(self, name: str, dtype: Any) -> Tensor:
        import torch

        recipe = self._recipes[name]
        if recipe.copy is not None:
            return self.source.read(recipe.copy)
        if recipe.rows:
            return torch.stack([_row(self.source.read_many(own).values(), recipe.in_turn) for own in recipe.rows])
        header = self.headers[name]
        dtype = dtype or {"BF16": torch.bfloat16, "F16": torch.float16}.get(header.dtype, torch.float32)
        if recipe.bias is not None:
            return self.bias(recipe.bias).to(dtype)
        if recipe.pieces[0][0] is None:
            return self.weight(recipe.pieces[0][1]).to(dtype)
        whole = torch.empty(header.shape, dtype=dtype)
        for place, weight in recipe.pieces:
            assert place is not None
            place.of(whole).copy_(self.weight(weight))
        return whole

    def weight(self, name: str) -> Tensor:
        """Returns the weight of a module as the checkpoint's numbers say: float32 when quantized, else as stored.

        What its inputs are multiplied by while the model runs is multiplied into it.
        """
        stored = self.view.targets.get(name)
        return self.source.read(f"{name}.weight") if stored is None else self.values(stored, self.decode(stored))

    def values(self, stored: StoredTarget, decoded: Decoded) -> Tensor:
        """Returns the weight that has been decoded, float32."""
        from quarkcli.numerics.quantize import dequantize

        found = dequantize(decoded.weight, stored.weight)
        return found if stored.columns is None else found * self.source.read(stored.columns).float()

    def bias(self, name: str) -> Tensor:
        """Returns the quantized bias of a module [out], float32."""
        from quarkcli.numerics.quantize import dequantize

        stored = self.view.targets[name]
        decoded = self.decode(stored).bias
        assert decoded is not None and stored.bias is not None
        return dequantize(decoded, stored.bias).reshape(-1)

    def decode(self, stored: StoredTarget) -> Decoded:
        assert self.reader is not None
        if not stored.places:
            return self.reader.decode(stored, self.source.read_many(stored.tensors))
        held = self._held  # by a name of its own: parts are read ahead in another thread
        if held.keys() != set(stored.tensors):
            held = self._held = self.source.read_many(stored.tensors)
        return self.reader.decode(stored, held)

    def activation_quantizers(self, tensors: Iterable[str]) -> Iterator[ActivationQuantizer]:
        """Yields quantizers of the inputs and outputs of the weights that lie in these tensors (source form)."""
        for tensor in tensors:
            for _, name in self._recipes[tensor].pieces:
                stored = self.view.targets.get(name)
                if stored is not None:
                    yield from self._activations(tensor, name, stored)

    def _activations(self, tensor: str, name: str, stored: StoredTarget) -> Iterator[ActivationQuantizer]:
        if stored.columns is not None and stored.input is not None:
            raise ModelError(
                "its inputs are multiplied before they are quantized, and quark cannot do that",
                where=name,
                kind="E-SOURCE-TRANSFORM",
            )
        decoded = self.decode(stored) if stored.is_static else None
        if stored.input is not None:
            scale = decoded.input if decoded is not None and stored.input.is_static else None
            prefix, index, down = self._expert(name) or ("", None, False)
            yield ActivationQuantizer(tensor, stored.input, scale, index, down, prefix)
        if stored.output is not None:
            scale = decoded.output if decoded is not None and stored.output.is_static else None
            yield ActivationQuantizer(tensor, stored.output, scale, output=True)

    def turned_inputs(self, tensors: Iterable[str]) -> dict[str, int]:
        """Returns those of these tensors (source form) whose inputs are turned by a block Hadamard, with its size.

        Raises ModelError for routed experts, which run fused where only inputs of linears are turned.
        """
        found: dict[str, int] = {}
        for tensor in tensors if self.view.online else ():
            pieces = [name for _, name in self._recipes[tensor].pieces]
            for name in pieces or [tensor.removesuffix(".weight")]:
                if name not in self.view.online:
                    continue
                if self._expert(name) is not None:
                    raise ModelError(
                        "the config rotates the input of a routed expert, and quark cannot do that",
                        where=name,
                        kind="E-SOURCE-TRANSFORM",
                    )
                found[tensor] = self.view.online[name]
        return found

    @property
    def quantizes_activations(self) -> bool:
        """True when anything but weights is quantized."""
        stored = self.view.targets.values()
        return any(t.input is not None or t.output is not None for t in stored) or bool(self.view.attention)

    @property
    def quantizes_softmax(self) -> bool:
        """True when running it as it is served needs attention whose softmax can be seen."""
        return any("p" in stored.specs for stored in self.view.attention.values())

    def attention_quantizers(self, tensors: Iterable[str]) -> Iterator[AttentionQuantizer]:
        """Yields quantizers of the attention modules whose k projection lies in these tensors."""
        assert self.reader is not None
        spec = self.family.attention
        present = set(tensors)
        for stored in self.view.attention.values():
            tensor = f"{stored.name}.{spec.k if spec else 'k_proj'}.weight"
            if tensor in present and not stored.specs and stored.scales:
                raise ModelError(
                    "its KV cache has a scale for every head, and quark cannot run that",
                    where=stored.name,
                    kind="E-SOURCE-FORMAT",
                )
            if tensor in present:
                scales = self.reader.decode_attention(stored, self.source.read_many(stored.scales.values()))
                yield AttentionQuantizer(tensor, stored.specs, scales)

    # -- from stored names to source form ------------------------------------------------------------------------

    def _lay_out(self) -> None:
        dtype = self.dtype
        for name in self.copied():
            header = self.source.headers[name]
            self._add(name, LogicalHeader(header.dtype, header.shape), _Recipe(copy=name))
        for name, stored in self.view.targets.items():
            self._add(f"{name}.weight", LogicalHeader(dtype, stored.shape), _Recipe(pieces=[(None, name)]))
            if stored.bias is not None:
                self._add(f"{name}.bias", LogicalHeader(dtype, stored.shape[:1]), _Recipe(bias=name))

    def _add(self, name: str, header: LogicalHeader, recipe: _Recipe) -> None:
        self.headers[name] = header
        self._recipes[name] = recipe

    def _rename(self) -> None:
        """Gives tensors, and the weights that are decoded, the names that the model was published with."""
        if not self.renamed:
            return
        modules = {old.removesuffix(".weight"): new.removesuffix(".weight") for old, new in self.renamed.items()}
        targets = self.view.targets.items()
        self.view = replace(
            self.view,
            targets={modules.get(name, name): replace(each, name=modules.get(name, name)) for name, each in targets},
            online={modules.get(name, name): block for name, block in self.view.online.items()},
        )
        for recipe in self._recipes.values():
            recipe.pieces = [(place, modules.get(name, name)) for place, name in recipe.pieces]
            recipe.bias = modules.get(recipe.bias, recipe.bias) if recipe.bias is not None else None
        self.headers = {self.renamed.get(name, name): header for name, header in self.headers.items()}
        self._recipes = {self.renamed.get(name, name): recipe for name, recipe in self._recipes.items()}

    def _expert(self, name: str) -> tuple[str, int, bool] | None:
        """Returns (prefix of the layer's experts, index, is the down projection) of an expert's module name."""
        experts = self.family.experts
        if experts is None:
            return None
        head, found, leaf = name.partition(f".{experts.path}.")
        index, _, projection = leaf.partition(".")
        if not found or not index.isdigit():
            return None
        return f"{head}.{experts.path}", int(index), projection == experts.down

    def _fuse(self, model: FamilyModel) -> None:
        """Replaces single experts' weights by the fused tensors that the family's own files have."""
        assert model.experts is not None
        layers: dict[str, dict[int, dict[str, str]]] = {}
        for tensor in list(self.headers):
            module = tensor.removesuffix(".weight")
            expert = self._expert(module)
            if expert is not None and tensor.endswith(".weight"):
                prefix, index, _ = expert
                layers.setdefault(prefix, {}).setdefault(index, {})[module.rpartition(".")[2]] = module
        for prefix, experts in layers.items():
            if not model.runs(prefix, self.source.config):  # MTP layers stay as they are stored
                continue
            block = prefix.removesuffix(f".{model.experts.path}")
            for tensor, fused in model.experts.fused_tensors(block).items():
                if all(target in leaves for leaves in experts.values() for target in fused.targets):
                    self._fuse_one(tensor, fused, experts)

    def _fuse_one(self, name: str, fused: family.FusedModel, experts: dict[int, dict[str, str]]) -> None:
        singles = [[experts[e][target] for target in fused.targets] for e in sorted(experts)]
        first = self.headers[f"{singles[0][0]}.weight"]
        shape = fused_shape(fused, len(singles), first.shape)
        pieces: list[tuple[WeightView | None, str]] = []
        for index, modules in enumerate(singles):
            views = fused_views(fused, name, shape, index, len(singles))
            pieces += [(view, module) for (_, view), module in zip(views, modules, strict=True)]
            for module in modules:
                del self.headers[f"{module}.weight"], self._recipes[f"{module}.weight"]
        self._add(name, LogicalHeader(first.dtype, shape), _Recipe(pieces=pieces))
        biases = [[f"{module}.bias" for module in modules] for modules in singles]
        if all(bias in self.source.headers and bias in self.headers for own in biases for bias in own):
            self._fuse_biases(f"{name.removesuffix('.weight')}_bias", biases, fused)

    def _fuse_biases(self, name: str, biases: list[list[str]], fused: family.FusedModel) -> None:
        first, width = self.headers[biases[0][0]], sum(self.headers[bias].shape[0] for bias in biases[0])
        for bias in (bias for own in biases for bias in own):
            del self.headers[bias], self._recipes[bias]
            self.renamed[bias] = name
        recipe = _Recipe(rows=biases, in_turn=fused.split == "interleaved")
        self._add(name, LogicalHeader(first.dtype, (len(biases), width)), recipe)


def _row(tensors: Iterable[Tensor], in_turn: bool) -> Tensor:
    import torch

    return torch.stack(list(tensors), -1).reshape(-1) if in_turn else torch.cat(list(tensors))


def _model_dtype(config: Any, others: list[str]) -> str:
    """Returns the dtype of decoded weights: the config's, else that of most other tensors."""
    text = family.text_config(config)
    name = config.get("dtype") or config.get("torch_dtype") or text.get("dtype") or text.get("torch_dtype")
    counts = Counter(dtype for dtype in others if dtype in _DTYPES.values())
    return _DTYPES.get(str(name)) or next((dtype for dtype, _ in counts.most_common(1)), "BF16")
