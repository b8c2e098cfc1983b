"""Turns every shape a `quant_cfg` was ever written in into one ordered list of canonical entries. Torch-free.

A canonical entry has explicit `quantizer_path`, `cfg` (only the fields that were written, or None), `enable`, and
`parent_class` where one was given. Accepted: ordered entries, flat dicts, single-key dicts, `default`, class scopes
(`nn.Linear`), several keys in one member with a class scope, `enable` inside the value, and lists of attributes (a
chain). Semantics as measured on NVIDIA ModelOpt 0.47; `default` is hoisted to the front of what it stands in, because
that is what it meant when it was written.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from quarkcli.documents.native import native
from quarkcli.errors import ConfigError, did_you_mean, in_brackets
from quarkcli.recipe.load import Path_
from quarkcli.recipe.mistakes import Mistakes

Cfg = dict[str, Any] | list[dict[str, Any]] | None
Located = tuple[Path_, str]
Step = tuple[str, dict[str, Any]]
Where = Callable[[Path_], str]

_PATH_KEYS = ("quantizer_path", "quantizer_name")
_ENTRY_KEYS = (*_PATH_KEYS, "cfg", "enable", "parent_class", "required")
_SCOPE = "nn."
LEGACY = "legacy form"  # how notes on older forms begin
_PLAIN = re.compile(r"[A-Za-z_][\w.]*")
_HINT = "write each entry as {quantizer_path: PATTERN, cfg: {...}, enable: true|false}"
_WORDS = {"true": True, "on": True, "yes": True, "1": True, "false": False, "off": False, "no": False, "0": False}


@dataclass(frozen=True)
class Canonical:
    """One entry, and where it was written (its path of keys and indices in the document)."""

    quantizer_path: str
    cfg: Cfg
    enable: bool
    parent_class: str | None = None
    required: bool | None = None
    place: Path_ = ()

    def as_dict(self) -> dict[str, Any]:
        """Returns the entry as a user may write it."""
        out: dict[str, Any] = {"quantizer_path": self.quantizer_path, "cfg": self.cfg, "enable": self.enable}
        if self.parent_class is not None:
            out["parent_class"] = self.parent_class
        if self.required is not None:
            out["required"] = self.required
        return out


@dataclass
class Normalized:
    """Holds the entries and the notes that were read from a configuration.

    entries     the ordered list
    notes       what to tell the user, with places: legacy forms, and what has no meaning here
    kv          entries for the cache and attention slots, where the configuration holds them apart; they come last
    algorithms  (method, parameters), in the order in which they run
    differs     what the tool that the configuration was written for would do otherwise, with places
    expert_inputs  `own`: every expert has a static input scale of its own
    share       groups of patterns on weight slots that alone share a per-tensor scale; None: nothing is said
    """

    entries: list[Canonical] = field(default_factory=list)
    notes: list[Located] = field(default_factory=list)
    kv: list[Canonical] = field(default_factory=list)
    algorithms: list[Step] = field(default_factory=list)
    differs: list[Located] = field(default_factory=list)
    share: list[tuple[list[str], Path_]] | None = None
    expert_inputs: Literal["shared", "own"] = "shared"


def normalize(value: Any, where: Where | None = None, base: Path_ = ()) -> Normalized:
    """Returns the canonical list of any accepted shape. Raises ConfigError with all refusals at once.

    where   text of a place for messages; None: the path itself, as `quant_cfg[2].cfg`
    base    path of `value` in its document
    """
    reader = _Reader()
    reader.top(native(value), base)
    if reader.problems:
        raise refusal(reader.problems, where or path_text, _HINT)
    return Normalized(reader.entries, reader.notes)


def path_text(path: Path_) -> str:
    return "quant_cfg" + "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)


def refusal(problems: list[Located], where: Where, hint: str = "") -> ConfigError:
    """Returns one error for all of them, each with its place."""
    each = [ConfigError(text, where=where(path), kind="E-ENTRY") for path, text in problems]
    if len(each) == 1:
        return ConfigError(each[0].what, where=each[0].where, hint=hint, kind="E-ENTRY")
    return Mistakes(each, hint=hint)


class _Reader:
    """Walks one value; collects entries, notes and problems."""

    def __init__(self) -> None:
        self.entries: list[Canonical] = []
        self.notes: list[Located] = []
        self.problems: list[Located] = []

    def refuse(self, path: Path_, text: str) -> None:
        self.problems.append((path, text))

    # -- shapes --------------------------------------------------------------------------------------------------

    def top(self, value: Any, path: Path_) -> None:
        if isinstance(value, Mapping):
            if any(key in value for key in _PATH_KEYS):
                self.refuse(path, "a single entry must be in a list: write '- ' in front of it")
            else:
                self.legacy(value, path, None)
        elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
            for index in sorted(range(len(value)), key=lambda i: not _is_default(value[i])):
                self.member(value[index], (*path, index))
        else:
            self.refuse(path, f"must be a list of entries, not {_word(value)}")

    def member(self, value: Any, path: Path_) -> None:
        if isinstance(value, Canonical):
            self.entries.append(value)
        elif not isinstance(value, Mapping):
            self.refuse(path, f"an entry must be a mapping, not {_word(value)}")
        elif not value:
            self.refuse(path, "the entry is empty")
        elif any(key in value for key in _PATH_KEYS):
            self.entry(value, path)
        elif len(value) > 1 and not any(str(key).startswith(_SCOPE) for key in value):
            keys = ", ".join(map(str, value))
            self.refuse(path, f"quantizer_path is missing, or {keys} should be entries of their own")
        else:
            self.legacy(value, path, None)

    def entry(self, value: Mapping[str, Any], path: Path_) -> None:
        """A new-style entry."""
        known = True
        for key in value:
            if key not in _ENTRY_KEYS:
                more = in_brackets(did_you_mean(str(key), _ENTRY_KEYS))
                self.refuse((*path, key), f"unknown key '{key}'{more}")
                known = False
        pattern = self.pattern(value, path)
        parent = value.get("parent_class")
        if parent is not None and not isinstance(parent, str):
            self.refuse((*path, "parent_class"), f"parent_class must be text, not {_word(parent)}")
        required = value.get("required")
        if required is not None and not isinstance(required, bool):
            self.refuse((*path, "required"), "required must be true or false")
        if "cfg" not in value and "enable" not in value:
            self.refuse(path, "neither cfg nor enable is given")
            return
        enable = self.switch(value["enable"], (*path, "enable")) if "enable" in value else None
        cfg, inner = self.cfg(value.get("cfg"), (*path, "cfg"))
        if enable is not None and inner is not None and enable != inner:
            self.refuse((*path, "cfg"), "enable inside cfg contradicts the entry's enable; remove one of the two")
        on = enable if enable is not None else inner if inner is not None else True
        if _is_empty(cfg):
            if on and value.get("cfg") is not None:
                self.refuse((*path, "cfg"), "cfg is empty; to switch only, write enable: true or false without cfg")
            cfg = None
        if pattern is not None and known:
            self.entries.append(Canonical(pattern, cfg, on, parent, required, path))

    def pattern(self, value: Mapping[str, Any], path: Path_) -> str | None:
        given = [key for key in _PATH_KEYS if key in value]
        if len(given) == 2:
            self.refuse(path, "quantizer_name and quantizer_path mean the same; remove one of them")
        pattern = value[given[0]]
        if isinstance(pattern, str) and pattern:
            return pattern
        self.refuse((*path, given[0]), f"{given[0]} must be a pattern, not {_word(pattern)}")
        return None

    # -- legacy --------------------------------------------------------------------------------------------------

    def legacy(self, value: Mapping[Any, Any], path: Path_, parent: str | None) -> None:
        """A dict from pattern (or class) to attributes, or one member of a list in that form."""
        for key in sorted(value, key=lambda key: key != "default"):
            at = (*path, key)
            if not isinstance(key, str) or not key:
                self.refuse(at, f"a pattern must be text, not {_word(key)}")
            elif key.startswith(_SCOPE):
                self.scope(key, value[key], at, parent)
            else:
                self.rule("*" if key == "default" else key, value[key], at, parent)

    def scope(self, key: str, value: Any, path: Path_, parent: str | None) -> None:
        if parent is not None:
            self.refuse(path, f"the class {key} is inside the class {parent}")
        elif not isinstance(value, Mapping):
            self.refuse(path, f"a class scope must map patterns to attributes, not {_word(value)}")
        elif "enable" in value:
            self.refuse(path, f"write {key}: {{'*': {{enable: {str(value['enable']).lower()}}}}}")
        elif not value:
            self.notes.append((path, f"the class scope {key} is empty and has no effect"))
        else:
            self.legacy(value, path, key)

    def rule(self, pattern: str, value: Any, path: Path_, parent: str | None) -> None:
        if value is None and parent is not None:
            self.refuse(path, "no attributes are given; write {enable: true} or {enable: false}")
            return
        if value is not None and not isinstance(value, Mapping | list | tuple):
            self.refuse(path, f"attributes must be a mapping, not {_word(value)}; write {{enable: true}} to switch")
            return
        if isinstance(value, Mapping) and any("*" in str(key) for key in value):
            self.refuse(path, f"'{pattern}' is not a class scope; those begin with '{_SCOPE}', as in 'nn.Linear'")
            return
        cfg, enable = self.cfg(value, path)
        entry = Canonical(pattern, None if _is_empty(cfg) else cfg, enable is not False, parent, None, path)
        self.entries.append(entry)
        self.notes.append((path, f"{LEGACY}; today it is written: - {_flow(entry.as_dict())}"))
        if pattern in _ENTRY_KEYS:
            self.notes.append((path, f"read as a pattern named '{pattern}'; is quantizer_path missing?"))

    # -- attributes ----------------------------------------------------------------------------------------------

    def cfg(self, value: Any, path: Path_) -> tuple[Cfg, bool | None]:
        """Returns (attributes without `enable`, the `enable` among them)."""
        if value is None:
            return None, None
        if isinstance(value, Mapping):
            return self.stage(value, path)
        if not isinstance(value, list | tuple):
            self.refuse(path, f"cfg must be a mapping or a list of mappings, not {_word(value)}")
            return None, None
        stages, switches = [], set()
        for index, member in enumerate(value):
            if not isinstance(member, Mapping):
                self.refuse((*path, index), f"a stage must be a mapping of attributes, not {_word(member)}")
                continue
            stage, enable = self.stage(member, (*path, index))
            stages.append(stage)
            switches.add(enable)
        switches.discard(None)
        if len(switches) > 1:
            self.refuse(path, "the stages have different values of enable")
        return stages, switches.pop() if switches else None

    def stage(self, value: Mapping[str, Any], path: Path_) -> tuple[dict[str, Any], bool | None]:
        rest = {key: item for key, item in value.items() if key != "enable"}
        return rest, self.switch(value["enable"], (*path, "enable")) if "enable" in value else None

    def switch(self, value: Any, path: Path_) -> bool:
        word = _WORDS.get(str(value).lower()) if value is not None else None
        if word is None:
            self.refuse(path, f"enable must be true or false, not {_word(value)}")
            return False
        return word


def _is_default(member: Any) -> bool:
    return isinstance(member, Mapping) and list(member) == ["default"]


def _is_empty(cfg: Cfg) -> bool:
    return cfg is not None and not any(cfg if isinstance(cfg, list) else [cfg])


def _word(value: Any) -> str:
    if value is None:
        return "nothing"
    kind = {str: "text", bool: "a yes or no", int: "a number", float: "a number", list: "a list", dict: "a mapping"}
    return f"{kind.get(type(value), type(value).__name__)} ({value!r})" if not isinstance(value, dict) else "a mapping"


def _flow(value: Any) -> str:
    """Returns one-line YAML."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_flow(key)}: {_flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_flow, value)) + "]"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str) and (value.lower() in ("true", "false", "null") or not _PLAIN.fullmatch(value)):
        return "'" + value.replace("'", "''") + "'"
    return str(value)
