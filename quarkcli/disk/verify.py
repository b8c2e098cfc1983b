"""Checks a written checkpoint from headers and scales: complete, finite, positive, equal where servers fuse."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from quarkcli import servers
from quarkcli.dialects.base import Writer
from quarkcli.disk import (
    completeness,
    contents,
    excluded,
    fidelity,
    manifest,
    nonfinite,
    parallel,
    pickles,
    same_config,
    ties,
)
from quarkcli.disk import scales as stored_scales
from quarkcli.disk.checkpoint import Checkpoint
from quarkcli.disk.headers import INDEX, SINGLE
from quarkcli.disk.made_from import open_original
from quarkcli.disk.nonfinite import HINT, NonFinite, OnNonfinite
from quarkcli.disk.side_files import QUANTIZATION
from quarkcli.disk.source import Source
from quarkcli.disk.values import Values, floats, has_floats, values
from quarkcli.errors import CheckError, ModelError, QuarkError, UsageError, all_of, none_of
from quarkcli.events import Listener, Message, Working, silent
from quarkcli.family import HeaderLike, Layout, Weight, for_checkpoint, lay_out, quantization
from quarkcli.plan.fused import Servers, matrix, sentence, splits
from quarkcli.plan.model import Plan
from quarkcli.plan.online import sentences


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
    none_of(missing, "tensors are missing")
    none_of(surplus, "tensors are not in the plan")
    wrong = [
        name
        for name, info in expected.items()
        if (written.headers[name].dtype, tuple(written.headers[name].shape)) != (info.dtype, tuple(info.shape))
    ]
    none_of(wrong, "tensors have another dtype or shape than planned")
    checks = [f"{len(expected)} tensors have the planned dtype and shape"]
    if dialect.reader is None:
        return [*checks, f"scales were not read back: quark cannot read checkpoint format {dialect.name}"]
    checkpoint = Checkpoint(written)
    read, said = checkpoint.view.online, plan.online
    none_of(sorted(read.items() ^ said.items()), "inputs are not rotated as planned")
    return checks + scales(checkpoint, plan) + turned_inputs(checkpoint)


def scales(
    checkpoint: Checkpoint, plan: Plan | None = None, tell: Listener = silent, target: Servers = "auto"
) -> list[str]:
    """Checks that every scale is finite and positive, and equal within scale groups where a tensor has one.

    Returns the checks made; raises CheckError. See `disk.scales`.
    """
    weights: Mapping[str, Weight] = plan.targets if plan is not None else checkpoint.singly.weights
    group_of = {name: weight.group for name, weight in weights.items()}
    if plan is not None:
        group_of = {target.name: target.scale_group for target in plan.targets.values()}
    return stored_scales.check(checkpoint, weights, group_of, tell, target != servers.NONE)


@dataclass(frozen=True)
class Asked:
    """The wishes of `quark verify`.

    source        the model it was made from
    target        what must load it: a server; auto: any; none: nothing, so that what servers fuse may differ
    tensor_parallel  degrees by which servers must be able to split it
    allow_pickle  the source may be pickles
    offline       the source comes from a directory or the hub's cache
    min_sqnr      least ratio of signal to noise, in dB, of every decoded weight; with a source
    on_nonfinite  `keep`: NaN and infinity in what was not quantized are told as warnings
    hashes        read all files to compare their hashes; None: up to 20 GB in all
    """

    source: str | None = None
    target: Servers = "auto"
    on_nonfinite: OnNonfinite = "stop"
    hashes: bool | None = None
    tensor_parallel: tuple[int, ...] = ()
    min_sqnr: float | None = None
    allow_pickle: bool = False
    offline: bool = False


def directory(
    path: str,
    source: str | None = None,
    target: Servers = "auto",
    on_nonfinite: OnNonfinite = "stop",
    tell: Listener = silent,
    hashes: bool | None = None,
) -> list[str]:
    """Checks a checkpoint as `check` does. Returns the checks made; raises QuarkError."""
    return check(path, Asked(source, target, on_nonfinite, hashes), tell)


def check(path: str, asked: Asked, tell: Listener = silent) -> list[str]:
    """`quark verify DIR`: checks a checkpoint alone, and against its manifest and its source model.

    Returns the checks made. Raises one error for all that is wrong; see `_every`.
    """
    _check_asked(asked)
    folder, model = Path(path), None
    if asked.source is not None:
        model = open_original(asked.source, folder, offline=asked.offline, allow_pickle=asked.allow_pickle, tell=tell)
        if asked.allow_pickle and not model.pickled:
            tell(Message(pickles.UNUSED, "warning"))
    return _every(
        lambda: _against_manifest(folder, asked.hashes),
        lambda: _contents(folder, model, asked, tell),
    )


def _check_asked(asked: Asked) -> None:
    """Raises UsageError for wishes that nobody can fulfil."""
    servers.check_name(asked.target)
    lacking = {"--min-sqnr": asked.min_sqnr is not None, "--allow-pickle": asked.allow_pickle}
    why = {
        "--min-sqnr": "needs --source, the model to compare with",
        "--allow-pickle": "needs --source: only the original model is read from pickle files",
    }
    for flag, given in lacking.items():
        if given and asked.source is None:
            raise UsageError(why[flag], where=flag, hint="add --source DIR_OR_ID", kind="E-FLAG-CONFLICT")


def _contents(folder: Path, model: Source | None, asked: Asked, tell: Listener) -> list[str]:
    """Checks the contents of the files, whatever a manifest says of them. Raises QuarkError."""
    source = _open(folder)
    described = quantization(source.config)
    if not described:
        what, beside = "config.json has no quantization_config", (folder / QUANTIZATION).is_file()
        hint = f"add to it what {QUANTIZATION} holds" if beside else "run 'quark quantize' to make a checkpoint"
        raise CheckError(what, where=str(folder), hint=hint, kind="E-CHECK-NOT-QUANTIZED")
    try:
        checkpoint = Checkpoint(source)
        layout = checkpoint.singly
    except ModelError as error:
        unsaid = "" if "quant_method" in described else "quantization_config has no quant_method, which servers need: "
        what = f"{unsaid}{error.what}"
        raise CheckError(what, where=error.where or str(folder), hint=error.hint, kind="E-CHECK-MODEL") from error
    view, config = checkpoint.view, source.config
    assert checkpoint.reader is not None
    reader, degrees = checkpoint.reader, asked.tensor_parallel
    return _every(
        lambda: [completeness.index(source)],
        lambda: [completeness.model(checkpoint)],
        lambda: [completeness.codes(checkpoint, layout)],
        lambda: ties.check(checkpoint),
        lambda: completeness.caches(checkpoint, layout),
        lambda: [completeness.strangers(checkpoint, layout, manifest.unchanged(folder))],
        lambda: [excluded.check(reader, described, layout, view.targets)],
        lambda: [_fused_schemes(checkpoint, asked.target)],
        lambda: turned_inputs(checkpoint),
        lambda: parallel.check(degrees, layout.weights, view, source.headers, config),
        lambda: scales(checkpoint, tell=tell, target=asked.target),
        lambda: stored_scales.codes(checkpoint, asked.hashes, manifest.HASH_LIMIT),
        lambda: kept_values(checkpoint, asked.on_nonfinite, tell),
        lambda: _served(checkpoint, layout, asked.target),
        lambda: _against_source(checkpoint, Checkpoint(model), asked.min_sqnr, tell) if model is not None else [],
    )


def _served(checkpoint: Checkpoint, layout: Layout, target: Servers) -> list[str]:
    """Returns which servers load it. Raises CheckError when the one that was named does not."""
    if target == "none":
        return []
    return servers.verdicts(target, as_served(checkpoint, layout), is_there=True)


def as_served(checkpoint: Checkpoint, layout: Layout) -> servers.Written:
    """Returns a quantized checkpoint as servers see it."""
    assert checkpoint.reader is not None
    described = quantization(checkpoint.source.config)
    renamed = next(iter(checkpoint.renamed), "")
    source = checkpoint.source
    unnamed = [*source.files] != [SINGLE] and not (source.folder / INDEX).is_file()
    return servers.Written(checkpoint.reader.name, described, checkpoint.plan(layout), renamed, unnamed)


def _every(*checks: Callable[[], list[str]]) -> list[str]:
    """Returns the lines of all checks.

    Raises one error for all that fail; the last, which knows most, is named first. Its `result` has the lines of the
    `checks` that passed, and one of the `problems` for each that did not.
    """
    lines: list[str] = []
    problems: list[QuarkError] = []
    single: list[dict[str, str]] = []
    for check in checks:
        try:
            lines += check()
        except QuarkError as error:
            found = error.result or {"checks": [], "problems": [_problem(error)]}
            lines += found["checks"]
            single = [*found["problems"], *single]
            problems.insert(0, error)
    if problems:
        together = all_of(problems)
        together.result = {"checks": lines, "problems": single}
        raise together
    return lines


def _problem(error: QuarkError) -> dict[str, str]:
    return {"id": error.kind, "what": error.what, "where": error.where, "hint": error.hint}


def _fused_schemes(checkpoint: Checkpoint, servers: Servers) -> str:
    """Returns the check made. Raises CheckError where servers fuse weights of several schemes, unless for none."""
    stored = checkpoint.view.targets
    found = splits(
        (weight, (stored[name].weight, stored[name].input) if name in stored else (None, None))
        for name, weight in checkpoint.singly.weights.items()
    )
    if found and servers != "none":
        hint = "quantize it again with one scheme for all of them; --target none accepts it"
        raise CheckError(sentence(found), hint=hint, kind="E-CHECK-SERVER")
    if found:
        return f"accepted by --target none: {sentence(found)}"
    return "weights that servers multiply together have one scheme" + (
        "; --target none is not used" if servers == "none" else ""
    )


def turned_inputs(checkpoint: Checkpoint) -> list[str]:
    """Returns the check made, none where no input is turned while the model runs.

    Raises CheckError for blocks that do not divide the width, differ among weights that servers fuse, or stand at
    routed experts, and for a stored matrix that is no Hadamard.
    """
    online = checkpoint.view.online
    if not online:
        return []
    weights = checkpoint.singly.weights
    shapes = {name: weight.shape for name, weight in weights.items()}
    none_of([n for n in online if n not in shapes], "modules other than linear ones have rotated inputs")
    none_of([n for n in online if weights[n].expert is not None], "inputs of routed experts are rotated")
    none_of([n for n, block in online.items() if shapes[n][1] % block], "inputs are rotated in blocks that do not fit")
    groups: dict[str, set[int | None]] = {}
    for name, weight in weights.items():
        groups.setdefault(matrix(weight), set()).add(online.get(name))
    split = [group for group, blocks in groups.items() if len(blocks) > 1]
    none_of(split, "groups of weights that servers multiply together have inputs that are rotated differently")
    none_of([n for n in checkpoint.view.matrices if not _is_hadamard(checkpoint.source, n)], "matrices are no Hadamard")
    return [f"rotated as the config says: {text}" for text in sentences(online)]


def _is_hadamard(source: Source, name: str) -> bool:
    """True for Sylvester's matrix, not divided by its norm."""
    import numpy as np

    header = source.headers[name]
    rows = header.shape[0] if header.shape else 0
    if header.shape != (rows, rows) or rows & (rows - 1):
        return False
    found = np.concatenate(list(floats(source, header))).reshape(rows, rows)
    order = np.arange(rows)
    odd = np.bitwise_count(order[:, None] & order) % 2 == 1
    return bool((found == np.where(odd, -1, 1)).all())


def kept_values(checkpoint: Checkpoint, on_nonfinite: OnNonfinite, tell: Listener) -> list[str]:
    """Reads every tensor that is stored as it was. Returns the check made, none where there is no such tensor.

    Raises CheckError for NaN or infinity in a parameter.
    """
    found = NonFinite(checkpoint.singly.tensor_roles)
    names, size, source = checkpoint.copied(), 0, checkpoint.source
    for name in names:
        tell(Working(f"reading {name}"))
        header = source.headers[name]
        size += header.nbytes
        summary = values(source, [name])[name] if has_floats(header) else Values()
        if summary.first is not None:
            place = nonfinite.place(summary.first, header.shape)
            found.note(name, len(header.shape), nonfinite.describe(summary.nonfinite, summary.count, place))
    first = found.first()
    if first is not None and on_nonfinite == "stop":
        raise CheckError(first[1], where=first[0], hint=HINT, kind="E-CHECK-NONFINITE")
    for text in nonfinite.warnings(found.parameters, found.others):
        tell(Message(text, "warning"))
    finite = len(names) - len(found.parameters) - len(found.others)
    return [f"values of {finite} of {len(names)} kept tensors are finite ({size / 1e6:,.1f} MB read)"] if names else []


def _against_manifest(folder: Path, hashes: bool | None) -> list[str]:
    listed = manifest.read(folder)
    if listed is not None:
        return manifest.compare(folder, listed, hashes)
    if hashes:
        raise CheckError(
            "there is no manifest, so there are no hashes to compare", where=str(folder), kind="E-CHECK-FILES"
        )
    return ["there is no manifest, so sizes, headers and hashes were not compared"]


def _against_source(checkpoint: Checkpoint, original: Checkpoint, least: float | None, tell: Listener) -> list[str]:
    """Compares names, shapes and values with those of the source, which may be quantized as well."""
    return _every(
        lambda: [same_config.check(checkpoint.source, original.source, tell)],
        lambda: fidelity.check(checkpoint, original, least, tell),
        lambda: [_nothing_lost(checkpoint, original)],
    )


def _nothing_lost(checkpoint: Checkpoint, original: Checkpoint) -> str:
    ours, theirs = _shapes(checkpoint, checkpoint.headers), _shapes(checkpoint, original.headers)
    missing = sorted(set(theirs) - set(ours))
    other = [name for name, shape in theirs.items() if name in ours and ours[name] != shape]
    none_of(missing, "tensors of the original model are missing")
    none_of(other, "tensors have another shape than in the original model")
    return f"all {len(original.headers)} tensors of the original model are there"


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
        return Source.open(str(folder), local=True)
    except ModelError as error:
        raise CheckError(error.what, where=error.where or str(folder), hint=error.hint, kind="E-CHECK-MODEL") from error
