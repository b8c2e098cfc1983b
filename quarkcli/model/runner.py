"""Runs one model a decoder block at a time. Other rooms use this file.

Order of use: `load_outside`, `record` per batch, `unload_outside`; then for each block `load_block`, `run_block` per
batch (under `handlers` to see or change what linears, experts and attention read), `unload_block`; at the end
`load_outside` and `logits`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quarkcli import memory
from quarkcli.errors import DataError, ModelError
from quarkcli.model import experts as expert_modules
from quarkcli.model.attention import tapped
from quarkcli.model.blocks import Weights
from quarkcli.model.handlers import Handlers
from quarkcli.model.record import Recorder, Recording
from quarkcli.model.skeleton import DATA_FREE_HINT, HeaderLike, build_skeleton


class Runner:
    """A model whose weights come and go part by part.

    folder             local directory with config.json (and custom code, if allowed)
    headers            every file tensor: name -> dtype text and shape, in file order
    device             where weights, arguments and hidden states live
    dtype              what to compute in; None: the config's
    trust_remote_code  allow a model that transformers does not know to run its own code
    eager              compute attention step by step, so that softmax outputs can be seen; else as fast as it goes
    transposed_experts  file tensors whose square matrices lie [in, out] where the class would take them for [out, in]

    Parameters never require gradients and everything runs without autograd.

    raises  ModelError: see `build_skeleton`; also when a parameter that text needs has no tensor or another shape
    """

    def __init__(
        self,
        folder: Path,
        headers: Mapping[str, HeaderLike],
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        trust_remote_code: bool = False,
        eager: bool = False,
        transposed_experts: Collection[str] = (),
    ) -> None:
        self.device = torch.device(device)
        self._skeleton = build_skeleton(
            Path(folder), headers, dtype=dtype, trust_remote_code=trust_remote_code, eager=eager
        )
        self._weights = Weights(self._skeleton, headers, self.device, transposed_experts)
        self._recorder = Recorder(self._skeleton)

    @property
    def dtype(self) -> torch.dtype:
        """Returns the dtype that the model computes in."""
        return self._skeleton.dtype

    @property
    def num_blocks(self) -> int:
        return len(self._skeleton.blocks)

    def check_tokens(self, tokens: torch.Tensor) -> None:
        """Raises DataError for a token number that the embedding has no row for."""
        try:
            table = self._skeleton.model.get_input_embeddings()
        except (NotImplementedError, AttributeError):  # a model with its own code that does not say
            return
        rows = table.weight.shape[0] if isinstance(table, nn.Embedding) else None
        if rows is not None and int(tokens.max()) >= rows:
            raise DataError(
                f"the tokenizer gives token {int(tokens.max())}, but the model's embedding has only {rows} rows",
                where="tokenizer",
                hint="use the tokenizer that came with the model; tokens were added without resizing the model",
                kind="E-DATA-VOCABULARY",
            )

    @property
    def has_head(self) -> bool:
        """True when the class ends in scores of tokens; a base model ends in hidden states."""
        return self._skeleton.model.get_output_embeddings() is not None

    def block_tensors(self, i: int) -> list[str]:
        """Returns file tensors that decoder block `i` needs, in file order."""
        return self._weights.files(self._weights.by_block[i])

    def outside_tensors(self) -> list[str]:
        """Returns file tensors that text needs outside the blocks (embedding, final norm, head, ...), in file order."""
        return self._weights.files(self._weights.outside)

    def unknown_tensors(self) -> list[str]:
        """Returns file tensors that are no parameter of the model (MTP layers, old rotary buffers), in file order."""
        return list(self._weights.map.unknown)

    def loads(self, tensor: str) -> bool:
        """True when the class has a parameter for a file tensor. Some files hold more than their class reads."""
        return tensor in self._weights.map.by_file

    def check_blocks(self) -> None:
        """Raises ModelError when a block's weights are another's too: what runs one at a time sees one of the uses."""
        for param, source in self._weights.shared().items():
            one, other = self._weights.block_of(source), self._weights.block_of(param)
            raise ModelError(
                f"decoder blocks {one} and {other} share weights, and calibration works on one block at a time",
                where=source,
                hint=DATA_FREE_HINT,
                kind="E-CLASS-FOLLOW",
            )

    def load_outside(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Loads what lies outside the blocks; tied weights share storage. Extra tensors are ignored.

        Parameters may share memory with `tensors`.
        """
        self._weights.load(self._weights.outside, self._weights.outside_buffers, tensors)

    def unload_outside(self) -> None:
        self._weights.unload(self._weights.outside, self._weights.outside_buffers)

    def load_block(self, i: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Loads decoder block `i`; extra tensors are ignored.

        On a loaded block, `tensors` may be a part: parameters none of whose file tensors are given stay. Parameters
        may share memory with `tensors`.
        """
        self._weights.load(self._weights.by_block[i], self._weights.block_buffers[i], tensors)

    def unload_block(self, i: int) -> None:
        self._weights.unload(self._weights.by_block[i], self._weights.block_buffers[i])
        memory.give_back()

    def record(
        self,
        tokens: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        share_with: Recording | None = None,
    ) -> Recording:
        """Returns the arguments of every block for this batch. The outside must be loaded, the blocks need not be.

        tokens          [b, T] token numbers
        attention_mask  [b, T], 1 for real tokens; None: no padding
        share_with      an earlier recording; argument tensors equal to its own are not stored again
        """
        mask = attention_mask.to(self.device) if attention_mask is not None else None
        return self._recorder.record(tokens.to(self.device), mask, share_with)

    def run_block(self, i: int, recording: Recording, hidden: Any) -> Any:
        """Returns hidden states behind block `i` for those before it. `hidden` is left as it is."""
        with self._experts(i):
            return self._recorder.run_block(i, recording, hidden)

    def run_with(self, i: int, recording: Recording, hidden: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
        """Does `run_block` with parameters made of these file tensors, all of the block's, and not the loaded ones.

        Gradients flow into `tensors`; what is loaded stays.
        """
        made = self._weights.made(self._weights.by_block[i], tensors)
        with self._experts(i):
            return self._recorder.run_block(i, recording, hidden, made)

    def logits(self, recording: Recording, hidden: Any, gradients: bool = False) -> torch.Tensor:
        """Returns [b, T, vocab] float32 for the hidden states behind the last block; the outside must be loaded.

        gradients   they flow into `hidden`
        """
        return self._recorder.logits(recording, hidden, gradients)

    def observe_tail(self, recording: Recording, hidden: Any, *, head: bool = True) -> None:
        """Runs final norm and head for the handlers that are installed; the outside must be loaded.

        head  False: nobody sees what the head returns, so that it is not computed; what it reads is seen
        """
        self._recorder.observe_tail(recording, hidden, head)

    @contextmanager
    def handlers(self, i: int | None, given: Handlers) -> Iterator[None]:
        """Sees, and changes, what modules of block `i` (None: outside the blocks) read or return, while inside.

        raises  KeyError for a file tensor that does not belong there
        """
        with ExitStack() as stack:
            hooked: set[nn.Module] = set()
            for name, handler in given.linear.items():
                for module in self._modules(i, name):
                    if module in hooked:
                        continue
                    hooked.add(module)
                    hook = module.register_forward_pre_hook(_input_hook(handler), with_kwargs=True)
                    stack.callback(hook.remove)
            for name, handler in given.outputs.items():
                for module in self._modules(i, name):
                    hook = module.register_forward_hook(_output_hook(handler))
                    stack.callback(hook.remove)
            for name, expert_handler in given.experts.items():
                self._modules(i, name)
                owner = self.expert_module(name)
                if owner is None:
                    raise KeyError(f"{name!r} is no tensor of an experts module")
                stack.enter_context(expert_modules.handled(owner, expert_handler))
            taps = {self._parent(i, name): tap for name, tap in given.attention.items()}
            softmaxes = {self._parent(i, name): tap for name, tap in given.softmax.items()}
            if taps or softmaxes:
                default = self._skeleton.model.config.get_text_config()._attn_implementation
                stack.enter_context(tapped(taps, softmaxes, default))
            yield

    @contextmanager
    def turning(self, i: int, turns: Mapping[str, Callable[[torch.Tensor], torch.Tensor]]) -> Iterator[None]:
        """Changes what linears of block `i` read, before any handler sees it, while inside. `turns`: by file tensor.

        raises  KeyError as `handlers`; ModelError when the class computes with a weight without calling its module
        """
        silent: dict[nn.Module, str] = {}
        with ExitStack() as stack:
            for name, turn in turns.items():
                for module in self._modules(i, name):
                    if module not in silent:
                        silent[module] = name
                        hook = _input_hook(_heard(turn, silent, module))
                        handle = module.register_forward_pre_hook(hook, prepend=True, with_kwargs=True)
                        stack.callback(handle.remove)
            yield
        for name in silent.values():
            if name:
                raise ModelError(
                    "its input must be rotated while the model runs, but the model's class does not call its module",
                    where=name,
                    hint="leave it out of the algorithm's 'slots' (the weights that it works on)",
                    kind="E-CLASS-FOLLOW",
                )

    def expert_module(self, name: str) -> nn.Module | None:
        """Returns the experts module that a file tensor belongs to, or None when it is no expert's."""
        path = self._weights.owners(name)[0][0].rpartition(".")[0]
        return expert_modules.experts_around(self._skeleton.model, path)

    def expert_count(self, module: nn.Module) -> int:
        """Returns the number of experts of an experts module."""
        return expert_modules.expert_count(module)

    def expert_hidden(self, module: nn.Module, expert: int, x: torch.Tensor) -> torch.Tensor:
        """Returns the input [n, I] of one expert's down projection for rows x [n, H], with the current weights."""
        with self._skeleton.code.running("fails in its experts"):
            return expert_modules.expert_hidden(module, expert, x)

    def _experts(self, i: int) -> AbstractContextManager[None]:
        """Returns how a pass goes over experts: in a loop on a CPU, elsewhere as the class does, which is faster."""
        return expert_modules.looped(self._skeleton.blocks[i]) if self.device.type == "cpu" else nullcontext()

    def _modules(self, i: int | None, name: str) -> list[nn.Module]:
        return list(dict.fromkeys(module for _, module in self._owners(i, name)))

    def _parent(self, i: int | None, name: str) -> nn.Module:
        path = self._owners(i, name)[0][0].rpartition(".")[0].rpartition(".")[0]
        return self._skeleton.model.get_submodule(path)

    def _owners(self, i: int | None, name: str) -> list[tuple[str, nn.Module]]:
        """Returns (parameter name, module) that a file tensor fills in block `i`."""
        found = [(param, module) for param, module in self._weights.owners(name) if self._weights.block_of(param) == i]
        if not found:
            place = "outside the blocks" if i is None else f"in decoder block {i}"
            raise KeyError(f"{name!r} does not lie {place}")
        return found


def _heard(
    turn: Callable[[torch.Tensor], torch.Tensor], silent: dict[nn.Module, str], module: nn.Module
) -> Callable[[torch.Tensor], torch.Tensor]:
    def turned(x: torch.Tensor) -> torch.Tensor:
        silent[module] = ""
        return turn(x)

    return turned


def _output_hook(handler: Callable[[torch.Tensor], Any]) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        return handler(output)

    return hook


def _input_hook(handler: Callable[[torch.Tensor], Any]) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            new = handler(args[0])
            return None if new is None else ((new, *args[1:]), kwargs)
        name = "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs))
        new = handler(kwargs[name])
        return None if new is None else (args, {**kwargs, name: new})

    return hook
