"""Defines an entry, one rule of the ordered list. Later entries win; torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

TARGET_KINDS = ("weight", "input", "output", "bias")  # of a module's slots
ATTENTION_KINDS = ("q", "k", "v", "p")  # of an attention's
SETTING = "--set "  # how the origin of a value begins that came from that flag


@dataclass(frozen=True)
class Origin:
    """Names the place of a rule: `flag --exclude '*q_proj'`, a file with line and column (1-based), or Python data with
    the path in it (`config`, `.quant_cfg[3]`).
    """

    text: str
    line: int | None = None
    column: int | None = None
    path: str = ""

    @property
    def is_flag(self) -> bool:
        """True when the rule comes from a flag beside the recipe. `--set` is none: it changes the recipe itself."""
        return self.text.startswith("--") and not self.text.startswith(SETTING)

    def __str__(self) -> str:
        if self.line is None:
            return self.text + self.path
        return f"{self.text}:{self.line}" + (f":{self.column}" if self.column is not None else "")


@dataclass(frozen=True)
class Entry:
    """One rule.

    quantizer_path  fnmatch pattern on the whole slot name, or `re:` and a regular expression for the whole name
    cfg             attributes as the user wrote them, in any vocabulary, a list for a chain; they replace all earlier
                    ones. None: only switch
    enable          on or off
    parent_class    only slots of modules of this class (`nn.Linear`, `nn.Embedding`), or None
    required        must match at least one slot
    unit            entries made from one flag or scheme share a unit and count as one for `required`
    user            written by the user, so it must not end without any effect
    """

    quantizer_path: str
    cfg: dict[str, Any] | list[dict[str, Any]] | None = field(default=None, hash=False)
    enable: bool = True
    parent_class: str | None = None
    required: bool = False
    origin: Origin = Origin("built-in")
    unit: str = ""
    user: bool = False


SCALED = "scaling_layers"  # among the parameters of a step: whose output channels it scales; all that it can if absent
SLOTS = "slots"  # among the parameters of a step: patterns on the weight slots it works on


@dataclass(frozen=True)
class Share:
    """Weights of one part that share a per-tensor scale: those whose weight slots any of the patterns matches.

    exact   these alone, without what the family groups with them, and apart for each expert and each of several modules
            of one kind; patterns need not match, and weights that no row names share nothing
    """

    slots: tuple[str, ...]
    origin: Origin = Origin("built-in")
    exact: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Returns the row as a user may write it."""
        return {"slots": list(self.slots), **({"exact": True} if self.exact else {})}
