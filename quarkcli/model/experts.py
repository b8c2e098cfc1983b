"""Runs mixture-of-experts modules one expert at a time.

Almost every family holds its experts fused in memory and runs them through one grouped kernel, where no hook can
see an expert. With a handler, an experts module instead runs a loop of per-expert matmuls, with the results of the
class's own forward. The loop is put on the one module as its `forward`: nothing global, nothing to select in the
config, and it works for the classes (llama4, dbrx) that transformers' registry of experts functions does not reach.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional as F

from quarkcli.errors import ModelError

ROWS = 32


class ExpertHandler(Protocol):
    """Sees and may change what the experts of one module read.

    observe        once per call: hidden [tokens, H] and top_k_index [tokens, k]
    gate_up_input  rows [n, H] routed to `expert`, n > 0; returns what its gate and up projections read
    down_input     rows [n, I] inside `expert`; returns what its down projection reads
    Rows come ordered by choice (first choices, then second ...), then by token.
    """

    def observe(self, module: nn.Module, hidden: torch.Tensor, top_k_index: torch.Tensor) -> None: ...

    def gate_up_input(self, expert: int, x: torch.Tensor) -> torch.Tensor: ...

    def down_input(self, expert: int, h: torch.Tensor) -> torch.Tensor: ...


class Layout(Protocol):
    """Reads and applies the weights of one kind of experts module.

    sparse  the class's own loop, too, gives an expert only the rows that are routed to it
    """

    sparse: bool

    def count(self, module: Any) -> int: ...

    def hidden(self, module: Any, expert: int, x: torch.Tensor) -> torch.Tensor: ...

    def down(self, module: Any, expert: int, h: torch.Tensor) -> torch.Tensor: ...

    def forward(self, module: Any, handler: ExpertHandler) -> Callable[..., torch.Tensor]: ...


class Fused:
    """Classes with transformers' experts contract: 3-D parameters and the flags has_gate, has_bias, is_transposed."""

    sparse = True

    @staticmethod
    def fits(module: Any) -> bool:
        return hasattr(module, "has_gate") and hasattr(module, "is_transposed") and hasattr(module, "down_proj")

    def count(self, module: Any) -> int:
        return module.down_proj.shape[0]

    def hidden(self, module: Any, expert: int, x: torch.Tensor) -> torch.Tensor:
        if module.has_gate:
            return module._apply_gate(self._linear(module, "gate_up_proj", expert, x))
        return module.act_fn(self._linear(module, "up_proj", expert, x))

    def down(self, module: Any, expert: int, h: torch.Tensor) -> torch.Tensor:
        y = self._linear(module, "down_proj", expert, h)
        return module.post_expert_norm(y) if getattr(module, "has_post_expert_norm", False) else y

    def forward(self, module: Any, handler: ExpertHandler) -> Callable[..., torch.Tensor]:
        def run(hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            return _routed(self, module, handler, hidden, index, weights)

        # Families call their experts by position or by their own argument names, always in this order.
        return lambda *args, **kwargs: run(*args, *kwargs.values())

    def _linear(self, module: Any, name: str, expert: int, x: torch.Tensor) -> torch.Tensor:
        weight = getattr(module, name)[expert]
        bias = getattr(module, name + "_bias")[expert] if module.has_bias else None
        if not module.is_transposed:
            return F.linear(x, weight, bias)
        # Not F.linear: a fused bias rounds once where these classes' own loop rounds twice.
        return x @ weight if bias is None else x @ weight + bias


class Unmarked(Fused):
    """Step 3.7: as above, but its class has no flags. Weights lie [out, in] without biases, gate above up."""

    @staticmethod
    def fits(module: Any) -> bool:
        fused, down = getattr(module, "gate_up_proj", None), getattr(module, "down_proj", None)
        if hasattr(module, "has_gate") or not hasattr(module, "_apply_gate") or fused is None or down is None:
            return False
        return fused.ndim == down.ndim == 3 and fused.shape[1:] == (2 * down.shape[2], down.shape[1])

    def hidden(self, module: Any, expert: int, x: torch.Tensor) -> torch.Tensor:
        return module._apply_gate(F.linear(x, module.gate_up_proj[expert]))

    def down(self, module: Any, expert: int, h: torch.Tensor) -> torch.Tensor:
        return F.linear(h, module.down_proj[expert])


class Scored:
    """llama4: every expert gets all tokens, already multiplied by the router score, zero where not routed."""

    sparse = False

    @staticmethod
    def fits(module: Any) -> bool:
        fused = getattr(module, "gate_up_proj", None)
        own = not hasattr(module, "has_gate") and not hasattr(module, "_apply_gate")
        return own and isinstance(fused, nn.Parameter) and fused.ndim == 3

    def count(self, module: Any) -> int:
        return module.gate_up_proj.shape[0]

    def hidden(self, module: Any, expert: int, x: torch.Tensor) -> torch.Tensor:
        gate, up = (x @ module.gate_up_proj[expert]).chunk(2, dim=-1)
        return up * module.act_fn(gate)

    def down(self, module: Any, expert: int, h: torch.Tensor) -> torch.Tensor:
        return h @ module.down_proj[expert]

    def forward(self, module: Any, handler: ExpertHandler) -> Callable[..., torch.Tensor]:
        def run(hidden: torch.Tensor) -> torch.Tensor:
            parts = hidden.view(self.count(module), -1, hidden.shape[-1])
            routed = parts.abs().amax(dim=-1) > 0
            token, owner = routed.T.nonzero(as_tuple=True)  # token by token, as other classes' rows are
            handler.observe(module, parts[owner, token], owner[:, None])
            out = torch.zeros_like(parts)
            for expert in range(self.count(module)):
                rows = routed[expert].nonzero()[:, 0]
                if len(rows):
                    out[expert, rows] = _one(self, module, handler, expert, parts[expert, rows])
            return out.view(-1, hidden.shape[-1])

        return run


class Stacked:
    """dbrx: 2-D stacks w1 (gate), v1 (up), w2 (down) of [experts * I, H] on the inner module `mlp`."""

    sparse = True

    @staticmethod
    def fits(module: Any) -> bool:
        inner = getattr(module, "mlp", None)
        return all(isinstance(getattr(inner, name, None), nn.Parameter) for name in ("w1", "v1", "w2"))

    def count(self, module: Any) -> int:
        return module.num_experts

    def hidden(self, module: Any, expert: int, x: torch.Tensor) -> torch.Tensor:
        gate = x.matmul(self._weight(module, "w1", expert).T)
        up = x.matmul(self._weight(module, "v1", expert).T)
        return module.mlp.activation_fn(gate) * up

    def down(self, module: Any, expert: int, h: torch.Tensor) -> torch.Tensor:
        return h.matmul(self._weight(module, "w2", expert))

    def forward(self, module: Any, handler: ExpertHandler) -> Callable[..., torch.Tensor]:
        def run(hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            flat = hidden.reshape(-1, hidden.shape[-1])
            out = _routed(self, module, handler, flat, index, weights)
            return out.view(hidden.shape[0], -1, hidden.shape[-1])

        return lambda *args, **kwargs: run(*args, *kwargs.values())

    def _weight(self, module: Any, name: str, expert: int) -> torch.Tensor:
        return getattr(module.mlp, name).view(module.num_experts, -1, module.hidden_size)[expert]


LAYOUTS = (Fused, Unmarked, Scored, Stacked)


def layout_of(module: nn.Module) -> Layout | None:
    """Returns the layout of an experts module; None for any other module."""
    return next((layout() for layout in LAYOUTS if layout.fits(module)), None)


def as_usual(module: nn.Module) -> bool:
    """True when experts lie [out, in], with all rows of gate above those of up."""
    flags = {"has_gate": True, "is_transposed": False, "is_concatenated": True}
    return Unmarked.fits(module) or all(getattr(module, flag, None) is value for flag, value in flags.items())


def experts_around(model: nn.Module, path: str) -> nn.Module | None:
    """Returns the experts module that the module at `path` is, or is the inner part of; None when there is none."""
    for candidate in (path, path.rpartition(".")[0]):
        module = model.get_submodule(candidate)
        if layout_of(module) is not None:
            return module
    return None


def expert_count(module: nn.Module) -> int:
    """Returns the number of experts of an experts module."""
    return _layout(module).count(module)


def expert_hidden(module: nn.Module, expert: int, x: torch.Tensor) -> torch.Tensor:
    """Returns the input [n, I] of one expert's down projection for rows x [n, H], with the current weights."""
    with torch.no_grad():
        return _layout(module).hidden(module, expert, _padded(x))[: len(x)]


@contextmanager
def handled(module: nn.Module, handler: ExpertHandler) -> Iterator[None]:
    """Runs `module` as a per-expert loop that asks `handler`; its own forward comes back afterwards."""
    with _forward(module, _layout(module).forward(module, handler)):
        yield


class Unchanged:
    """Sees nothing and changes nothing (an `ExpertHandler`)."""

    def observe(self, module: nn.Module, hidden: torch.Tensor, top_k_index: torch.Tensor) -> None:
        return

    def gate_up_input(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        return x

    def down_input(self, expert: int, h: torch.Tensor) -> torch.Tensor:
        return h


@contextmanager
def looped(block: nn.Module) -> Iterator[None]:
    """Experts inside `block` that nobody handles run as the same loop: sparse ones of the class would not pad rows."""
    with ExitStack() as stack:
        for module in block.modules():
            layout = layout_of(module)
            if layout is not None and layout.sparse and "forward" not in module.__dict__:
                stack.enter_context(handled(module, Unchanged()))
        yield


@contextmanager
def shapes_only(block: nn.Module) -> Iterator[None]:
    """Experts inside `block` return their input: routing looks at values, which the meta device has not."""
    with ExitStack() as stack:
        for module in block.modules():
            if layout_of(module) is not None:
                stack.enter_context(_forward(module, lambda hidden, *args, **kwargs: torch.empty_like(hidden)))
        yield


@contextmanager
def _forward(module: nn.Module, forward: Callable[..., torch.Tensor]) -> Iterator[None]:
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if before is not None:
            module.__dict__["forward"] = before


def _layout(module: nn.Module) -> Layout:
    layout = layout_of(module)
    if layout is None:
        raise ModelError(
            f"{type(module).__name__} stores its experts in a way that quark does not know", kind="E-CLASS-FOLLOW"
        )
    return layout


def _routed(
    layout: Layout,
    module: nn.Module,
    handler: ExpertHandler,
    hidden: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    """Returns what transformers' grouped kernels do: a token's experts are added up in float32, and rounded once."""
    handler.observe(module, hidden, index)
    out = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
    for expert in range(layout.count(module)):
        choice, token = index.T.eq(expert).nonzero(as_tuple=True)
        if len(token) == 0:
            continue
        y = _one(layout, module, handler, expert, hidden[token]) * weights[token, choice, None]
        out.index_add_(0, token, y.to(out.dtype))
    return out.to(hidden.dtype)


def _one(layout: Layout, module: nn.Module, handler: ExpertHandler, expert: int, x: torch.Tensor) -> torch.Tensor:
    h = layout.hidden(module, expert, _padded(handler.gate_up_input(expert, x)))[: len(x)]
    return layout.down(module, expert, _padded(handler.down_input(expert, h)))[: len(x)]


def _padded(x: torch.Tensor) -> torch.Tensor:
    """Returns 16-bit rows on a CPU with rows of zeros up to a multiple of `ROWS`; others as they are.

    oneDNN compiles a kernel for every number of rows and keeps it, half a megabyte each; experts get ever new numbers.
    One row takes another way through it, which needs no kernel.
    """
    if x.device.type != "cpu" or x.element_size() != 2 or len(x) <= 1:
        return x
    return F.pad(x, (0, 0, 0, -len(x) % ROWS))
