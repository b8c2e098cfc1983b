"""Shows a report in Python: a dict, with one line at a prompt and a table in a notebook."""

from __future__ import annotations

from html import escape
from typing import Any

from quarkcli.reporting import losses
from quarkcli.reporting.log import duration


class Report(dict[str, Any]):
    """Holds the report of a run (`quark/report/2`), as `quark report DIR --json` shows it.

    With several dialects, `report["dialects"]` has a report for each directory. Under torchrun only the first rank has
    a report; the others have an empty one.
    """

    def __repr__(self) -> str:
        if "size" not in self:
            return f"<quark report: {', '.join(map(str, self)) or 'of another rank'}>"
        return f"<quark report: {'; '.join(text for _, text in self._lines())}>"

    def _repr_html_(self) -> str:
        rows = [*self._lines(), *losses.rows(self)] if "size" in self else []
        rows += [("warning", text) for text in self.get("warnings", ())]
        cells = (
            f"<tr><th style='text-align:left'>{escape(a)}</th><td style='text-align:left'>{escape(b)}</td></tr>"
            for a, b in rows
        )
        return f"<table>{''.join(cells)}</table>" if rows else escape(repr(self))

    def _lines(self) -> list[tuple[str, str]]:
        size, warnings = self["size"], len(self["warnings"])
        share = size["output_bytes"] / max(1, size["source_bytes"])
        return [
            ("recipe", f"{self['model']['name']}, {self['recipe']['name']}"),
            ("size", f"{size['source_bytes']:,} -> {size['output_bytes']:,} bytes ({share:.0%})"),
            ("time", duration(self["seconds"])),
            ("warnings", f"{warnings} warning{'' if warnings == 1 else 's'}"),
        ]
