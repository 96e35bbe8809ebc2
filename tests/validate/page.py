"""An HTML page read back: its elements, and the text of each that has an id."""

from __future__ import annotations

import dataclasses
from html.parser import HTMLParser

VOID = {"meta", "br", "hr", "img", "input", "link", "source", "base", "embed"}


@dataclasses.dataclass
class Element:
    """One element: tag, attributes, and all text inside it."""

    tag: str
    attributes: dict[str, str]
    text: str = ""


class Page(HTMLParser):
    """Parses a page at once. `errors`: end tags that close nothing or the wrong element."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[Element] = []
        self.errors: list[str] = []
        self._open: list[Element] = []
        self.feed(text)
        self.close()
        self.errors += [f"{element.tag} is never closed" for element in self._open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self._open.append(self.elements[-1])

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(Element(tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        if not self._open or self._open.pop().tag != tag:
            self.errors.append(f"</{tag}> closes nothing")

    def handle_data(self, data: str) -> None:
        for element in self._open:
            element.text += data

    def all(self, tag: str, css_class: str | None = None) -> list[Element]:
        """The elements of a tag, and of a class if given."""
        return [
            element
            for element in self.elements
            if element.tag == tag
            and (css_class is None or css_class in element.attributes.get("class", "").split())
        ]

    def text(self, identity: str) -> str:
        """The text of the one element with this id, white space collapsed."""
        (found,) = [e for e in self.elements if e.attributes.get("id") == identity]
        return " ".join(found.text.split())

    def rows(self, label: str) -> list[list[str]]:
        """The cells of the body of the table in the region called `label`."""
        rows: list[list[str]] = []
        inside = False
        for element in self.elements:
            if element.tag == "div" and "aria-label" in element.attributes:
                inside = element.attributes["aria-label"] == label
            elif inside and element.tag == "tr":
                rows.append([])
            elif (
                inside and element.tag in ("td", "th") and element.attributes.get("scope") != "col"
            ):
                rows[-1].append(" ".join(element.text.split()))
        return [row for row in rows if row]
