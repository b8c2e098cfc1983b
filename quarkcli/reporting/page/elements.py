"""Builds the elements of a page, and escapes texts and attributes when it writes them."""

from __future__ import annotations

from html import escape
from xml.etree import ElementTree as ET

Element = ET.Element
_EMPTY = {"meta"}  # elements without an end
Child = Element | str | None


def element(tag: str, *children: Child, **attributes: str | int | float | None) -> Element:
    """Returns an element. `class_` and `for_` lose their last letter, `_` inside becomes `-`; None is left out."""
    found = {
        key.rstrip("_").replace("_", "-"): _number(value) for key, value in attributes.items() if value is not None
    }
    made = ET.Element(tag, found)
    for child in children:
        _append(made, child)
    return made


def _append(parent: Element, child: Child) -> None:
    if child is None:
        return
    if not isinstance(child, str):
        parent.append(child)
    elif len(parent):
        parent[-1].tail = (parent[-1].tail or "") + clean(child)
    else:
        parent.text = (parent.text or "") + clean(child)


def _number(value: str | int | float) -> str:
    return clean(value) if isinstance(value, str) else f"{value:.6g}" if isinstance(value, float) else str(value)


def clean(text: str) -> str:
    """Returns `text` with a mark for every letter that no page may hold or that steers how others are shown."""
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() or letter == "\n" else "\N{REPLACEMENT CHARACTER}" for letter in text)


def document(title: str, style: str, *body: Child) -> str:
    """Returns a page that loads nothing and runs nothing. `style`: of our own, it is not escaped."""
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    sheet = ET.Element("style")
    sheet.text = style
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        sheet,
    )
    page = element("html", head, element("body", *body), lang="en")
    written = ["<!DOCTYPE html>\n"]
    _write(page, written)
    return "".join(written) + "\n"


def _write(node: Element, to: list[str]) -> None:
    """Adds the text of an element. ElementTree's own leaves `<` in attributes as it is."""
    to.append(f"<{node.tag}")
    to += [f' {name}="{escape(value)}"' for name, value in node.items()]
    to.append(">")
    if node.tag in _EMPTY:
        return
    text = node.text or ""
    to.append(text if node.tag == "style" else escape(text, quote=False))
    for child in node:
        _write(child, to)
        to.append(escape(child.tail, quote=False) if child.tail else "")
    to.append(f"</{node.tag}>")
