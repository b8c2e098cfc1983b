"""Turns names of many experts into few `re:` patterns, and checks that each matches exactly them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from quarkcli.errors import ConfigError, ModelError
from quarkcli.family import FamilyModel
from quarkcli.plan.model import Target
from quarkcli.recipe.expressions import Expressions

_MARK = "re:"


class WrittenNames:
    """Full names and `re:` patterns of a written config, on the modules of its checkpoint.

    As compressed-tensors does it, a name is equal, and a pattern matches from the start. Raises ModelError for a
    pattern that is none, or that takes too long.
    """

    def __init__(self, texts: Iterable[str], modules: Iterable[str]) -> None:
        self._found = Expressions("match")
        patterns = [text.removeprefix(_MARK) for text in texts if text.startswith(_MARK)]
        with _of_the_model():
            self._match = {_MARK + pattern: self._found.matcher(pattern) for pattern in patterns}
            self._found.learn(patterns, modules)

    def named(self, module: str, texts: Iterable[str]) -> bool:
        """True when one of the texts is the name of the module, or a pattern that matches it."""
        return any(self._match[text](module) if text in self._match else text == module for text in texts)


@contextmanager
def _of_the_model() -> Iterator[None]:
    try:
        yield
    except ConfigError as error:
        raise ModelError(error.what, where="quantization_config", hint=error.hint, kind="E-SOURCE-CONFIG") from error


def exact_patterns(targets: Iterable[Target], universe: Iterable[str]) -> list[str]:
    """Returns the full names of `targets`; routed experts as patterns that match exactly them in `universe`."""
    dense: list[Target] = []
    routed: list[Target] = []
    for target in targets:
        (routed if target.expert is not None else dense).append(target)
    names = [target.name for target in dense]
    if not routed:
        return names
    known = list(universe)
    for group in _alike(routed).values():
        names += _expert_patterns(group, known)
    return names


def in_memory(texts: Iterable[str], family: FamilyModel | None) -> list[str]:
    """Returns texts of a config, and behind them the names that transformers has in memory for names in them.

    It renames modules of some families while it loads (`FamilyModel.renamed`), and looks for modules in a config by its
    own names.
    """
    found = list(texts)
    return list(dict.fromkeys([*found, *(own for text in found if (own := _own_name(text, family)) is not None)]))


def unfound(texts: Iterable[str], family: FamilyModel | None) -> list[str]:
    """Returns the names in a config for which transformers has others in memory, where the config lacks those."""
    found = list(texts)
    return [text for text in found if (own := _own_name(text, family)) is not None and not _is_said(own, found)]


def _own_name(text: str, family: FamilyModel | None) -> str | None:
    """Returns the name of a module in transformers' memory where it is another one; None for patterns."""
    own = text if text.startswith(_MARK) else _in_memory(text, family)
    return own if own != text else None


def _in_memory(module: str, family: FamilyModel | None) -> str:
    return module if family is None else family.in_memory(module)


def _is_said(name: str, texts: list[str]) -> bool:
    return name in texts or WrittenNames(texts, [name]).named(name, texts)


def linear_patterns(names: Iterable[str], universe: Iterable[str]) -> list[str]:
    """Returns patterns that match exactly these modules of decoder blocks, whatever a server puts before the blocks.

    Modules alike but for their numbers are one pattern. Names stand for themselves where no short one is exact.
    """
    known = list(universe)
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.sub(r"(?<=\.)\d+(?=\.|$)", "#", name), []).append(name)
    found = []
    for group in groups.values():
        short = [_from_layers(name) for name in group]
        candidates = (rf"(.*\.)?{numbers(short)}$" for numbers in (_any_number, _these_numbers))
        exact = (p for p in candidates if {name for name in known if re.match(p, name)} == set(group))
        pattern = next(exact, None)
        found += [_MARK + pattern] if pattern is not None else group
    return found


def ignored(
    targets: Iterable[Target], universe: Iterable[str], quantized: Iterable[str], family: FamilyModel | None = None
) -> list[str]:
    """Returns names and patterns of unquantized `targets`, none of them matching a `quantized` name.

    A tree beside the decoder (a vision tower, a projector) without a quantized module becomes one pattern that allows
    another prefix: transformers keeps such trees under other names in memory than the files have, and vLLM and SGLang
    have none of them below `model`. Where transformers has another name for the tree itself, that is a pattern as well.
    """
    taken = list(dict.fromkeys(own for name in quantized for own in (name, _in_memory(name, family))))
    roots: dict[str, bool] = {}
    trees: dict[str, None] = {}
    rest = []
    for target in targets:
        tree = _tree_of(target.name, taken, roots) if target.expert is None else None
        if tree is None:
            rest.append(target)
            continue
        trees[_MARK + tree] = None
        own = _in_memory(target.name, family)
        if not re.match(tree, own):
            other = _tree_of(own, taken, roots)
            trees[own if other is None else _MARK + other] = None
    return [*trees, *exact_patterns(rest, universe)]


def _tree_of(name: str, taken: list[str], known: dict[str, bool]) -> str | None:
    """Returns a pattern of the largest tree around a module in which nothing is `taken`; None without one."""
    root = next((root for root in _roots(name) if _untouched(root, taken, known)), None)
    if root is None:
        return None
    short = root.removeprefix("model.")
    return _tree(short if _untouched(short, taken, known) else root)


def _roots(name: str) -> Iterator[str]:
    """Yields the parents of a module that are above every numbered list, shortest first."""
    parts = name.split(".")
    first = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts))
    for length in range(1, min(first, len(parts) - 1) + 1):
        yield ".".join(parts[:length])


def _tree(root: str) -> str:
    return rf"(.*\.)?{re.escape(root)}\."


def _untouched(root: str, taken: list[str], known: dict[str, bool]) -> bool:
    """True when no quantized module is under `root`; `known` remembers answers."""
    if root not in known:
        matcher = re.compile(_tree(root))
        known[root] = not any(matcher.match(name) for name in taken)
    return known[root]


def _alike(targets: list[Target]) -> dict[tuple[str, frozenset[str]], dict[str, list[Target]]]:
    """Returns (prefix with numbers marked, projections) -> layer prefix -> its targets."""
    layers: dict[str, list[Target]] = {}
    for target in targets:
        assert target.expert is not None
        layers.setdefault(target.expert[0], []).append(target)
    found: dict[tuple[str, frozenset[str]], dict[str, list[Target]]] = {}
    for prefix, members in layers.items():
        key = (re.sub(r"(?<=\.)\d+(?=\.|$)", "#", prefix), frozenset(_projection(member) for member in members))
        found.setdefault(key, {})[prefix] = members
    return found


def _projection(target: Target) -> str:
    """Returns the projection of a target: `gate_proj` of `<prefix>.7.gate_proj`."""
    assert target.expert is not None
    prefix, index = target.expert
    return target.name.removeprefix(f"{prefix}.{index}.")


def _expert_patterns(layers: dict[str, list[Target]], universe: list[str]) -> list[str]:
    names = [target.name for members in layers.values() for target in members]
    wanted = set(names)
    for pattern in _candidates(layers):
        matcher = re.compile(pattern)
        if {name for name in universe if matcher.match(name)} == wanted:
            return [_MARK + pattern]
    return names


def _candidates(layers: dict[str, list[Target]]) -> Iterator[str]:
    """Yields patterns from short to long: any layer, these layers, and the same from the very start of the name.

    The short ones begin at the layer list, because servers put other prefixes in front of it.
    """
    prefixes = list(layers)
    projections = sorted({_projection(target) for members in layers.values() for target in members})
    tail = rf"\.\d+\.({'|'.join(map(re.escape, projections))})$"
    for short in (True, False):
        heads = [_from_layers(prefix) if short else prefix for prefix in prefixes]
        start = r"(.*\.)?" if short else ""
        for numbers in (_any_number, _these_numbers):
            yield f"{start}{numbers(heads)}{tail}"


def _from_layers(prefix: str) -> str:
    """Returns `layers.3.mlp.experts` for `model.layers.3.mlp.experts`; the whole prefix when it has no number."""
    parts = prefix.split(".")
    first = next((i for i, part in enumerate(parts) if part.isdigit()), 0)
    return ".".join(parts[max(first - 1, 0) :])


def _any_number(heads: list[str]) -> str:
    return r"\.".join(r"\d+" if part.isdigit() else re.escape(part) for part in heads[0].split("."))


def _these_numbers(heads: list[str]) -> str:
    columns = zip(*(head.split(".") for head in heads), strict=True)
    return r"\.".join(_alternatives(list(dict.fromkeys(column))) for column in columns)


def _alternatives(parts: list[str]) -> str:
    return re.escape(parts[0]) if len(parts) == 1 else f"({'|'.join(map(re.escape, parts))})"
