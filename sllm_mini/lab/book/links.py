"""What is wrong with the links of a static site: those that lead to no page or no place on it, and pages that fetch from elsewhere."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

_FETCHING = {("script", "src"), ("img", "src"), ("link", "href"), ("iframe", "src"), ("source", "src")}
_NOT_FETCHED = ("canonical", "search", "index", "prev", "next", "author", "copyright")
"""What a `link` may be whose target a browser does not fetch."""


@dataclass
class _Page(HTMLParser):
    """Its anchors, and its links as (tag, target)."""

    anchors: set[str] = field(default_factory=set)
    links: list[tuple[str, str]] = field(default_factory=list)
    unresolved: list[str] = field(default_factory=list)
    """Roles that refer to something of the package and became no link."""
    _open: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.anchors.update(given[name] for name in ("id", "name") if name in given)
        if tag == "a" and "href" in given:
            self.links.append(("a", given["href"]))
        for name in ("src", "href"):
            if (tag, name) in _FETCHING and name in given and given.get("rel") not in _NOT_FETCHED:
                self.links.append((tag, given[name]))
        classes = given.get("class", "").split()
        if tag == "code" and "py-obj" in classes and "a" not in self._open:
            self.unresolved.append("a name of the package")
        if tag in ("a", "div", "p"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self._open:
            while self._open.pop() != tag:
                continue


def problems(site: Path) -> list[str]:
    """One sentence each; empty for a site that is whole."""
    pages = {path: _read(path) for path in sorted(site.rglob("*.html"))}
    found: list[str] = []
    for path, page in pages.items():
        where = path.relative_to(site)
        found += [f"{where}: {what} is referred to and not offered" for what in page.unresolved]
        for tag, target in page.links:
            parts = urlsplit(target)
            if parts.scheme in ("http", "https") or parts.netloc:
                if tag != "a":
                    found.append(f"{where}: a reader without a network has no {target}, which a {tag} fetches")
                continue
            if parts.scheme:
                continue
            file = path if not parts.path else (path.parent / unquote(parts.path)).resolve()
            if not file.is_file():
                found.append(f"{where}: {target} is not there")
            elif parts.fragment and file in pages and unquote(parts.fragment) not in pages[file].anchors:
                found.append(f"{where}: {target} has no such place on its page")
    return found


def _read(path: Path) -> _Page:
    page = _Page()
    page.feed(path.read_text())
    return page
