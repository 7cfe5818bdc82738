"""What the book's Sphinx is given beside its themes: formulas as MathML, which browsers draw themselves, so that no page fetches a library,
and what readers who use a keyboard or a screen reader need and the theme leaves out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from docutils import nodes

_LEFT_OUT = {'role="heading">': 'role="heading" aria-level="2">', "<pre>": '<pre tabindex="0">', '<div class="table-wrapper': '<div tabindex="0" class="table-wrapper'}
"""Captions say which heading they are; code and tables that are wider than their box can be scrolled from the keyboard."""


def setup(app: Any) -> dict[str, bool]:
    """Called by Sphinx."""
    app.add_html_math_renderer("mathml", inline_renderers=(_inline, None), block_renderers=(_block, None))
    app.connect("build-finished", _finish)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def heading_anchor(title: str) -> str:
    """By which links of a chapter name a heading: JupyterLab's way."""
    return title.replace(" ", "-")


def _inline(translator: Any, node: nodes.math) -> None:
    _write(translator, node, "inline")


def _block(translator: Any, node: nodes.math_block) -> None:
    _write(translator, node, "block")


def _write(translator: Any, node: Any, display: str) -> None:
    from latex2mathml.converter import convert

    translator.body.append(convert(node.astext(), display=display))
    raise nodes.SkipNode


def _finish(app: Any, error: Exception | None) -> None:
    for page in Path(app.outdir).rglob("*.html") if error is None else ():
        text = page.read_text()
        for without, whole in _LEFT_OUT.items():
            text = text.replace(without, whole)
        page.write_text(text)
