"""Checks of a written checkpoint, from headers and scales: complete, finite, positive, equal where servers fuse."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quarkcli.dialects.base import Decoded, StoredTarget, Writer
from quarkcli.disk import contents, manifest, nonfinite
from quarkcli.disk.checkpoint import Checkpoint
from quarkcli.disk.nonfinite import HINT, NonFinite, OnNonfinite
from quarkcli.disk.source import Source
from quarkcli.errors import CheckError, ModelError, QuarkError, all_of
from quarkcli.events import Listener, Message, Working, silent
from quarkcli.family import HeaderLike, Layout, Weight, check_fit, for_checkpoint, lay_out
from quarkcli.plan.fused import Servers, matrix, sentence, splits
from quarkcli.plan.model import Plan
from quarkcli.plan.online import sentences

if TYPE_CHECKING:
    from torch import Tensor

    from quarkcli.numerics.quantize import QParams
    from quarkcli.spec import TensorSpec

# What unequal scales of one level cost where servers fuse.
_COST = "servers keep one for each member, or round all codes again with the largest, which costs some accuracy"


def against_plan(folder: Path, plan: Plan, dialect: Writer, source_headers: Mapping[str, HeaderLike]) -> list[str]:
    """Checks that a directory holds what the plan says. Returns the checks made; raises CheckError."""
    written = _open(folder)
    owners = contents.part_targets(plan)
    expected = {
        info.name: info
        for part in plan.parts
        for info in contents.part_infos(plan, dialect, part, source_headers, owners)
    }
    missing = sorted(set(expected) - set(written.headers))
    surplus = sorted(set(written.headers) - set(expected))
    _none(missing, "tensors are missing")
    _none(surplus, "tensors are not in the plan")
    wrong = [
        name
        for name, info in expected.items()
        if (written.headers[name].dtype, tuple(written.headers[name].shape)) != (info.dtype, tuple(info.shape))
    ]
    _none(wrong, "tensors have another dtype or shape than planned")
    checks = [f"{len(expected)} tensors present with the planned dtype and shape"]
    if dialect.reader is None:
        return [*checks, f"scales not read back: dialect {dialect.name} is only written here"]
    checkpoint = Checkpoint(written)
    read, said = checkpoint.view.online, plan.online
    _none(sorted(read.items() ^ said.items()), "inputs are not turned as planned")
    return checks + scales(checkpoint, plan) + turned_inputs(checkpoint)


def scales(checkpoint: Checkpoint, plan: Plan | None = None, tell: Listener = silent) -> list[str]:
    """Checks that every scale is finite and positive, and equal within scale groups where a tensor has one.

    Those of weight-only integers may be negative.
    Raises CheckError; but scales of one level that differ within what servers fuse are a warning: servers keep one per
    member, or take the largest and round the codes of the others again.
    """
    from quarkcli.numerics.scales import may_be_negative

    bad: list[str] = []
    groups: dict[str, dict[str, float | None]] = {}
    inputs: dict[str, dict[str, float | None]] = {}
    layers: dict[str, set[float | None]] = {}
    weights: Mapping[str, Weight] = plan.targets if plan is not None else _weights(checkpoint)
    fused = {name: weight.group for name, weight in weights.items()}
    group_of = fused if plan is None else {target.name: target.scale_group for target in plan.targets.values()}
    for name, stored in checkpoint.view.targets.items():
        decoded = checkpoint.decode(stored)
        params, static = decoded.weight.params, decoded.input
        signed = stored.input is None and may_be_negative(stored.weight)
        if not _all_good(params, stored.weight, signed) or any(
            not _good(s) for s in (static, decoded.output) if s is not None
        ):
            bad.append(name)
        if (
            decoded.bias is not None
            and stored.bias is not None
            and not _all_good(decoded.bias.params, stored.bias, False)
        ):
            bad.append(f"{name}.bias")
        bad += [f"{name} (no {kind} scale)" for kind in _absent(stored, decoded)]
        if static is not None and name in weights and weights[name].expert is not None:
            layers.setdefault(matrix(weights[name]), set()).add(_number(static))
        if stored.weight.has_tensor_scale:
            groups.setdefault(group_of.get(name, name), {})[name] = _tensor_scale(params)
            inputs.setdefault(fused.get(name, name), {})[name] = _number(static)
    for attention in checkpoint.view.attention.values():
        assert checkpoint.reader is not None
        tensors = checkpoint.source.read_many(attention.scales.values())
        values = checkpoint.reader.decode_attention(attention, tensors)
        bad += [f"{attention.name}.{kind}" for kind, value in values.items() if not _good(value)]
    _none(bad, "modules have a scale that is zero, negative, infinite, NaN or absent")
    both = (*groups.items(), *inputs.items())
    unequal = {group: list(members) for group, members in both if len(set(members.values())) > 1}
    targets = checkpoint.view.targets
    two_level = sorted(g for g, members in unequal.items() if any(_over(targets[name].weight) for name in members))
    _none(two_level, "scale groups do not share their per-tensor scales")
    if unequal:
        what = f"{len(unequal)} scale groups do not share their per-tensor scales"
        tell(Message(f"{what}: {_COST} ({_some(sorted(unequal))})", "warning"))
    own = sorted(layer for layer, values in layers.items() if len(values) > 1)
    if own:
        what = f"{len(own)} layers have experts with input scales of their own"
        tell(Message(f"{what}: servers take the largest for all experts of a layer ({_some(own)})", "warning"))
    caches = len(checkpoint.view.attention)
    shared = sum(len(members) > 1 and name not in unequal for name, members in groups.items())
    return [
        f"scales of {len(targets)} weights and {caches} attentions finite and positive",
        f"{shared} scale groups share their per-tensor scales",
    ]


def _over(spec: TensorSpec) -> bool:
    """True when block scales lie under a scale of the tensor, which servers take from one member for all."""
    return any(stage.scale is not None and stage.scale.global_scale is not None for stage in spec.stages)


def directory(
    path: str,
    source: str | None = None,
    target: Servers = "auto",
    on_nonfinite: OnNonfinite = "stop",
    tell: Listener = silent,
    hashes: bool | None = None,
) -> list[str]:
    """`quark verify DIR [--source X]`: checks a checkpoint alone, and against its manifest and its source model.

    target        `none`: modules that servers fuse may have more than one scheme
    on_nonfinite  `keep`: NaN and infinity in what was not quantized are told as warnings
    hashes        read all files to compare their hashes; None: up to 20 GB in all
    """
    folder, model = Path(path), Source.open(source) if source is not None else None
    return _every(
        lambda: _against_manifest(folder, hashes),
        lambda: _contents(folder, model, target, on_nonfinite, tell),
    )


def _contents(
    folder: Path, model: Source | None, target: Servers, on_nonfinite: OnNonfinite, tell: Listener
) -> list[str]:
    """Checks the contents of the files, whatever a manifest says of them. Raises QuarkError."""
    checkpoint = Checkpoint(_open(folder))
    if not checkpoint.quantized:
        raise CheckError("no quantization_config in config.json", where=str(folder))
    return _every(
        lambda: [_complete(checkpoint)],
        lambda: [_fused_schemes(checkpoint, target)],
        lambda: turned_inputs(checkpoint),
        lambda: scales(checkpoint, tell=tell),
        lambda: [kept_values(checkpoint, on_nonfinite, tell)],
        lambda: [_against_source(checkpoint, model)] if model is not None else [],
    )


def _every(*checks: Callable[[], list[str]]) -> list[str]:
    """Returns the lines of all checks.

    Raises one error for all that fail; the last, which knows most, is named first.
    """
    lines: list[str] = []
    problems: list[QuarkError] = []
    for check in checks:
        try:
            lines += check()
        except QuarkError as error:
            problems.insert(0, error)
    if problems:
        raise all_of(problems)
    return lines


def _complete(checkpoint: Checkpoint) -> str:
    """Returns the check made. Raises CheckError for missing tensors and wrong shapes.

    Blocks, experts and config.json say which tensors there are, and their shapes.
    """
    config, headers = checkpoint.source.config, checkpoint.headers
    _none(list(checkpoint.source.unlisted), "tensors are in the files and not in the index")
    try:
        layout = lay_out(checkpoint.family_name, checkpoint.family, checkpoint.inferred, config, headers)
        check_fit(checkpoint.family, layout, config, headers)
    except ModelError as error:
        raise CheckError(error.what, where=error.where, hint="write it again, or copy it again") from error
    return "blocks, experts, widths and counts fit config.json and each other"


def _fused_schemes(checkpoint: Checkpoint, servers: Servers) -> str:
    """Returns the check made. Raises CheckError where servers fuse weights of several schemes, unless for none."""
    stored = checkpoint.view.targets
    found = splits(
        (weight, (stored[name].weight, stored[name].input) if name in stored else (None, None))
        for name, weight in _weights(checkpoint).items()
    )
    if found and servers != "none":
        hint = "quantize it again with one scheme for all members; --target none accepts it"
        raise CheckError(sentence(found), hint=hint)
    if found:
        return f"accepted by --target none: {sentence(found)}"
    return "what servers fuse has one scheme" + ("; --target none is not used" if servers == "none" else "")


def turned_inputs(checkpoint: Checkpoint) -> list[str]:
    """Returns the check made, none where no input is turned while the model runs.

    Raises CheckError for blocks that do not divide the width, differ among weights that servers fuse, or stand at
    routed experts, and for a stored matrix that is no Hadamard.
    """
    online = checkpoint.view.online
    if not online:
        return []
    weights = _weights(checkpoint)
    shapes = {name: weight.shape for name, weight in weights.items()}
    _none([n for n in online if n not in shapes], "inputs are turned of what is no linear")
    _none([n for n in online if weights[n].expert is not None], "inputs of routed experts are turned")
    _none([n for n, block in online.items() if shapes[n][1] % block], "inputs are turned in blocks that do not fit")
    groups: dict[str, set[int | None]] = {}
    for name, weight in weights.items():
        groups.setdefault(matrix(weight), set()).add(online.get(name))
    split = [group for group, blocks in groups.items() if len(blocks) > 1]
    _none(split, "groups of weights that servers fuse have members whose inputs are turned otherwise")
    _none(
        [n for n in checkpoint.view.matrices if not _is_hadamard(checkpoint.source.read(n))], "matrices are no Hadamard"
    )
    return [f"turned as the config says: {text}" for text in sentences(online)]


def _is_hadamard(matrix: Tensor) -> bool:
    """True for Sylvester's matrix, not divided by its norm."""
    import torch

    from quarkcli.numerics.hadamard import sylvester

    rows = len(matrix)
    square = matrix.shape == (rows, rows) and rows & (rows - 1) == 0
    return square and torch.equal(matrix.float(), sylvester(rows).float())


def kept_values(checkpoint: Checkpoint, on_nonfinite: OnNonfinite, tell: Listener) -> str:
    """Reads every tensor that is stored as it was. Raises CheckError for NaN or infinity in a parameter."""
    found = NonFinite(_layout(checkpoint).tensor_roles)
    names, size = checkpoint.copied(), 0
    for name in names:
        tell(Working(f"reading {name}"))
        tensor = checkpoint.source.read(name)
        size += tensor.nbytes
        found.look(name, tensor)
    first = found.first()
    if first is not None and on_nonfinite == "stop":
        raise CheckError(first[1], where=first[0], hint=HINT)
    for text in nonfinite.warnings(found.parameters, found.others):
        tell(Message(text, "warning"))
    finite = len(names) - len(found.parameters) - len(found.others)
    return f"values of {finite} of {len(names)} kept tensors finite ({size / 1e6:,.1f} MB read)"


def _against_manifest(folder: Path, hashes: bool | None) -> list[str]:
    listed = manifest.read(folder)
    if listed is not None:
        return manifest.compare(folder, listed, hashes)
    if hashes:
        raise CheckError("there is no manifest, so no hashes to compare", where=str(folder))
    return ["no manifest: sizes, headers and hashes not compared"]


def _against_source(checkpoint: Checkpoint, source: Source) -> str:
    original = Checkpoint(source)  # it may be quantized as well
    ours, theirs = _shapes(checkpoint, checkpoint.headers), _shapes(checkpoint, original.headers)
    missing = sorted(set(theirs) - set(ours))
    other = [name for name, shape in theirs.items() if name in ours and ours[name] != shape]
    _none(missing, "source tensors are not accounted for")
    _none(other, "tensors have another shape than in the source")
    return f"all {len(original.headers)} source tensors accounted for"


def _shapes(checkpoint: Checkpoint, headers: Mapping[str, HeaderLike]) -> dict[str, tuple[int, ...]]:
    """Returns the shapes by tensor name, with experts one by one: files of one family keep them fused or apart."""
    name, found, inferred = checkpoint.family_name, checkpoint.family, checkpoint.inferred
    if inferred:  # from these names, which may have fused what the others have apart
        name, found, inferred = for_checkpoint(checkpoint.source.config, headers)
    layout = lay_out(name, found, inferred, checkpoint.source.config, headers)
    owned = {weight.view.tensor for weight in layout.weights.values()}
    others = {name: tuple(header.shape) for name, header in headers.items() if name not in owned}
    return others | {f"{weight.name}.weight": weight.shape for weight in layout.weights.values()}


def _open(folder: Path) -> Source:
    try:
        return Source.open(str(folder))
    except ModelError as error:
        raise CheckError(error.what, where=error.where or str(folder)) from error


def _weights(checkpoint: Checkpoint) -> dict[str, Weight]:
    """Returns every weight, quantized or kept, as the family says; experts one by one."""
    return _layout(checkpoint).weights


def _layout(checkpoint: Checkpoint) -> Layout:
    """Returns the family applied to the source form of the checkpoint, experts one by one."""
    headers = {f"{name}.weight": header for name, header in _singles(checkpoint)}
    return lay_out(
        checkpoint.family_name, checkpoint.family, checkpoint.inferred, checkpoint.source.config,
        {**checkpoint.headers, **headers},
    )  # fmt: skip


def _singles(checkpoint: Checkpoint) -> Iterable[tuple[str, Any]]:
    from quarkcli.disk.checkpoint import LogicalHeader

    for name, stored in checkpoint.view.targets.items():
        yield name, LogicalHeader("BF16", stored.shape)


def _all_good(params: QParams, spec: TensorSpec, signed: bool) -> bool:
    """True when the scales of every stage are good, and its zero points finite; `signed`: they may be negative."""
    import torch

    if params.zero_point is not None and not bool(torch.isfinite(params.zero_point).all()):
        return False
    if params.then is not None and spec.then is not None and not _all_good(params.then, spec.then, False):
        return False
    scale = params.scale.abs() if signed and params.scale is not None else params.scale
    return (scale is None or _good(scale)) and (params.global_scale is None or _good(params.global_scale))


def _absent(stored: StoredTarget, decoded: Decoded) -> Iterator[str]:
    """Yields kinds of activations whose static scale is not in the files."""
    for kind, spec, scale in (("input", stored.input, decoded.input), ("output", stored.output, decoded.output)):
        if spec is not None and spec.needs_amax and scale is None:
            yield kind


def _good(scale: Tensor) -> bool:
    """True for a finite and positive scale; for a byte unless it is the NaN code.

    A byte is e8m0, or e5m3, where 0 stands for an all-zero group.
    """
    import torch

    if scale.dtype == torch.uint8:
        return bool((scale != 255).all())
    values = scale.float()
    return bool((torch.isfinite(values) & (values > 0)).all())


def _tensor_scale(params: QParams) -> float | None:
    if params.global_scale is not None:
        return float(params.global_scale)
    return float(params.scale) if params.scale is not None and params.scale.numel() == 1 else None


def _number(scale: Tensor | None) -> float | None:
    return float(scale) if scale is not None else None


def _none(names: Collection[object], what: str) -> None:
    if names:
        raise CheckError(f"{len(names)} {what}: {_some(names)}")


def _some(names: Collection[object]) -> str:
    return ", ".join(map(str, islice(names, 5))) + (" ..." if len(names) > 5 else "")
