"""Lays text out for a terminal. No width cuts inside a name."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence

GAP = "  "
_LEAST = 18  # columns below which a column of sentences is not readable
_LABELLED = re.compile(r"( *\S+(?: \S+){0,2} {2,})\S")  # `  size      18.4 MB ...`
_JOINTS = re.compile(r"(?<=[./,:=-])(?=[^./,:=-])")  # where a name may go on in the next line, if it must
_LESSER = (re.compile(r"(?<=_)(?=[^_])"), re.compile(r"(?<=[a-z0-9])(?=[A-Z])"))  # underscores; words of a class name


def room(name: str = "stdout") -> int | None:
    """Returns the columns of a stream's terminal, or $COLUMNS there; None where a program reads, and nothing is cut."""
    stream = getattr(sys, name)
    is_terminal = stream is not None and stream.isatty() and os.environ.get("TERM") != "dumb"
    return shutil.get_terminal_size().columns if is_terminal else None


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], width: int | None) -> list[str]:
    """Returns aligned lines, the headers first. Cells that do not fit go on below; else a row is a block of lines."""
    lines = [list(headers), *map(list, rows)]
    natural = [max(len(line[column]) for line in lines) for column in range(len(headers))]
    widths = _shrunk(natural, [_narrowest(lines, column) for column in range(len(headers))], width)
    if widths is None:
        assert width is not None
        return list(_blocks(headers, rows, width))
    return [text for line in lines for text in _row(line, widths)]


def fits(headers: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> bool:
    """Returns whether a table has room without a cell that goes on below."""
    lines = [headers, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headers))]
    return sum(widths) + len(GAP) * (len(widths) - 1) <= width


def _narrowest(lines: Sequence[Sequence[str]], column: int) -> int:
    """Returns the least width of a column: its longest word, the whole of a name; more for one of sentences."""
    longest = max((len(word) for line in lines for word in line[column].split()), default=0)
    whole = max(len(line[column]) for line in lines)
    return whole if column == 0 else max(longest, min(whole, _LEAST))


def _shrunk(natural: list[int], least: list[int], width: int | None) -> list[int] | None:
    """Returns widths that fit; None where none do."""
    widths = list(natural)
    over = sum(widths) + len(GAP) * (len(widths) - 1) - width if width is not None else 0
    while over > 0:
        wide = max(range(len(widths)), key=lambda column: (widths[column] > least[column], widths[column]))
        if widths[wide] <= least[wide]:
            return None
        widths[wide] -= 1
        over -= 1
    return widths


def _row(cells: Sequence[str], widths: Sequence[int]) -> Iterator[str]:
    folded = [fold(cell, width) for cell, width in zip(cells, widths, strict=True)]
    for number in range(max(map(len, folded))):
        parts = ((lines[number] if number < len(lines) else "") for lines in folded)
        yield GAP.join(part.ljust(width) for part, width in zip(parts, widths, strict=True)).rstrip()


def _blocks(headers: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> Iterator[str]:
    """Yields each row as its name, and a line per cell under it."""
    for row in rows:
        yield from fold(row[0], width)
        for header, cell in zip(headers[1:], row[1:], strict=True):
            if cell not in ("", "-"):
                yield from wrapped(f"  {header.lower()}  {cell}", width)


def fold(text: str, width: int) -> list[str]:
    """Returns a cell in lines of at most `width`, broken between words; inside a name only where it has joints."""
    lines = [""]
    for word in text.split():
        for piece, new in _pieces(word, width):
            glue = " " if lines[-1] and new else ""
            if lines[-1] and len(lines[-1]) + len(glue) + len(piece) > width:
                lines.append(piece)
            else:
                lines[-1] += glue + piece
    return lines


def _pieces(word: str, width: int) -> Iterator[tuple[str, bool]]:
    """Yields a word in pieces, and whether a word begins: whole where it fits, else cut behind its joints."""
    width = max(1, width)
    for number, part in enumerate(_joined(word, width)):
        for start in range(0, len(part), width):  # a digest, or what else has no joint
            yield part[start : start + width], number == start == 0


def _joined(word: str, width: int) -> list[str]:
    """Returns the parts between the joints of a word that is wider; lesser joints only where nothing else helps."""
    parts = [word]
    for joint in (_JOINTS, *_LESSER):
        parts = [piece for part in parts for piece in (joint.split(part) if len(part) > width else [part])]
    return parts


def wrapped(text: str, width: int | None, taken: int = 0) -> list[str]:
    """Returns a line in lines of at most `width`; those that go on are indented under the text behind a label.

    taken   columns before its first line
    """
    if width is None or len(text) + taken <= width:
        return [text]
    label = _LABELLED.match(text)
    start = len(text) - len(text.lstrip())
    lead = label[1] if label else text[:start]
    least = max(
        _LEAST, min(width, max((len(part) for word in text.split() for part in _joined(word, width)), default=0))
    )
    under = len(lead) if len(lead) > 3 else len(lead) + 2
    if max(under, taken + len(lead)) + least <= width:
        first, *rest = fold(text[len(lead) :], width - max(under, taken + len(lead)))
        return [lead + first, *(" " * under + line for line in rest)]
    under = max(0, min(start + 4, width - least))  # narrow: the text goes below its label
    head = [lead.rstrip()] if label or taken else []
    return [*head, *(" " * under + line for line in fold(text[len(lead) :], width - under))]
