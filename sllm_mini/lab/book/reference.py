"""The reference pages of the book: what each package offers, read from the package itself. Pure but for importing it.

Docstrings here are Markdown in all but name (code in single backquotes), so the pages are too: MyST directives of Sphinx's Python
domain, which the index and cross-references come from. A name in backquotes that its package offers becomes a link.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

PACKAGES = (
    "sllm_mini.checkpoint", "sllm_mini.loading", "sllm_mini.storage", "sllm_mini.inference", "sllm_mini.control.controller", "sllm_mini.control.cluster",
    "sllm_mini.control.estimate", "sllm_mini.control.messages", "sllm_mini.control.placement", "sllm_mini.control.keepalive", "sllm_mini.control.autoscale",
    "sllm_mini.control.multicast", "sllm_mini.cluster", "sllm_mini.cluster.trace", "sllm_mini.serving.server", "sllm_mini.serving.options", "sllm_mini.eviction",
    "sllm_mini.device", "sllm_mini.wire", "sllm_mini.types", "sllm_mini.errors",
)  # fmt: skip
"""In the order of the book: from bytes at rest to the front door, and what all of them stand on."""


def pages() -> dict[str, str]:
    """Markdown by file name: one page for each of `PACKAGES`, and `index.md`. Raises ImportError where one of them is not installed."""
    made = {f"{name}.md": _page(name) for name in PACKAGES}
    rows = "\n".join(f"- {{doc}}`{name} <{name}>`: {_first_sentence(importlib.import_module(name))}" for name in PACKAGES)
    tree = "\n".join(PACKAGES)
    made["index.md"] = f"# Reference\n\nWhat each package offers to whoever imports it. Chapters say why; this says what.\n\n{rows}\n\n```{{toctree}}\n:hidden:\n\n{tree}\n```\n"
    return made


def offered(package: str) -> dict[str, Any]:
    """The public names of a package with what they are: its `__all__`, else what it defines itself."""
    module = importlib.import_module(package)
    if hasattr(module, "__all__"):
        return {name: getattr(module, name) for name in module.__all__}
    found = {name: value for name, value in vars(module).items() if not name.startswith("_") and getattr(value, "__module__", None) == package}
    return {name: value for name, value in found.items() if inspect.isclass(value) or inspect.isfunction(value)}


def _page(package: str) -> str:
    names = offered(package)
    known = {name: f"{package}.{name}" for name in names}
    parts = [f"# `{package}`", _text(inspect.getdoc(importlib.import_module(package)) or "", known)]
    parts += [_entry(package, name, value, known) for name, value in names.items()]
    return "\n\n".join(parts) + "\n"


def _first_sentence(value: object) -> str:
    text = " ".join((inspect.getdoc(value) or "").split())
    return _escaped(re.split(r"(?<=[.:])\s", text, maxsplit=1)[0].rstrip(".:") + ".")


def _entry(package: str, name: str, value: Any, known: dict[str, str]) -> str:
    if inspect.isclass(value):
        return _class(package, name, value, known)
    if callable(value) and (inspect.isfunction(value) or hasattr(value, "__wrapped__")):
        return _directive("function", f"{package}.{name}{signature(value)}", _text(inspect.getdoc(value) or "", known))
    return _directive("data", f"{package}.{name}", f"`{value!r:.80}`" if isinstance(value, int | str) else _text(type(value).__name__, {}))


def _class(package: str, name: str, value: type, known: dict[str, str]) -> str:
    exception = issubclass(value, BaseException)
    parts = [_text(_own_doc(value), known)]
    for member, found in _members(value):
        title = f"{package}.{name}.{member}"
        if isinstance(found, property):
            parts.append(_directive("property", title, _text(inspect.getdoc(found) or "", known), "```"))
        else:
            function = found.__func__ if isinstance(found, classmethod | staticmethod) else found
            options = [":classmethod:"] if isinstance(found, classmethod) else [":staticmethod:"] if isinstance(found, staticmethod) else []
            shown = signature(function, bound=not isinstance(found, staticmethod))
            parts.append(_directive("method", f"{title}{shown}", _text(inspect.getdoc(found) or "", known), "```", options))
    title = f"{package}.{name}" + ("" if exception or getattr(value, "_is_protocol", False) else signature(value))
    return _directive("exception" if exception else "class", title, "\n\n".join(filter(None, parts)), "`````")


def _members(value: type) -> Iterator[tuple[str, Any]]:
    """Public methods and properties that the class defines itself, in its order."""
    for name, found in vars(value).items():
        if not name.startswith("_") and isinstance(found, property | classmethod | staticmethod | type(_members)):
            yield name, found


def _own_doc(value: type) -> str:
    """Not the signature that a dataclass has for want of a docstring, nor an ancestor's."""
    text = inspect.cleandoc(value.__dict__.get("__doc__") or "")
    return "" if text.startswith(f"{value.__name__}(") else text


def signature(function: Callable[..., Any], *, bound: bool = False) -> str:
    """As Sphinx can read it: a default that Python could not read back is an ellipsis. Nothing where there is none."""
    try:
        found = inspect.signature(function)
    except (TypeError, ValueError):
        return ""
    parameters = [each.replace(annotation=_Plain(each.annotation)) for each in list(found.parameters.values())[1 if bound else 0 :]]
    told = found.return_annotation if inspect.isroutine(function) else found.empty  # making a class gives one of it
    shown = str(found.replace(parameters=[each if _reads_back(each.default) else each.replace(default=...) for each in parameters], return_annotation=_Plain(told)))
    shown = shown.replace("Ellipsis", "...")
    try:
        ast.parse(f"def f{shown}: ...")
    except SyntaxError:
        return f"({', '.join(each.name for each in parameters)})"
    return shown


class _Plain:
    """An annotation that is shown as it was written, without quotation marks around it."""

    def __new__(cls, annotation: object) -> Any:
        return super().__new__(cls) if isinstance(annotation, str) else annotation

    def __init__(self, annotation: object) -> None:
        self._written = str(annotation)

    def __repr__(self) -> str:
        return self._written


def _reads_back(default: object) -> bool:
    if default is inspect.Parameter.empty:
        return True
    try:
        ast.parse(repr(default), mode="eval")
    except SyntaxError:
        return False
    return len(repr(default)) <= 60


def _directive(kind: str, title: str, body: str, fence: str = "`````", options: list[str] | None = None) -> str:
    head = "\n".join([f"{fence}{{py:{kind}}} {title}", *(options or [])])
    return f"{head}\n\n{body}\n{fence}"


def _text(doc: str, known: dict[str, str]) -> str:
    """A docstring as Markdown: in its indented parts nothing is changed, elsewhere names become links and nothing is taken for HTML or formulas."""
    return "\n".join(line if line.startswith("    ") else _linked(line, known) for line in doc.splitlines())


def _linked(line: str, known: dict[str, str]) -> str:
    parts = re.split(r"(`[^`]*`)", line)
    return "".join(_code(part, known) if number % 2 else _escaped(part) for number, part in enumerate(parts))


def _code(part: str, known: dict[str, str]) -> str:
    target = known.get(part[1:-1])
    return part if target is None else f"{{py:obj}}`{part[1:-1]} <{target}>`"


def _escaped(text: str) -> str:
    return re.sub(r"([<$\[\]*_|])", r"\\\1", text)
