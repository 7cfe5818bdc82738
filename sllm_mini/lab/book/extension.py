"""What the book's Sphinx is given beside its themes: formulas as MathML, which browsers draw themselves, so that no page fetches a library."""

from __future__ import annotations

from typing import Any

from docutils import nodes


def setup(app: Any) -> dict[str, bool]:
    """Called by Sphinx."""
    app.add_html_math_renderer("mathml", inline_renderers=(_inline, None), block_renderers=(_block, None))
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
