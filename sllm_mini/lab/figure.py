"""A figure that says what it shows: an image with alt text and a caption, whatever program opens the notebook.

Jupyter's own way of storing a picture has no place for alt text that every viewer reads, so a chapter shows
`describe(fig, "…")`, which is stored as `<figure><img alt="…">` beside a plain-text twin (the alt text itself).
"""

from __future__ import annotations

import base64
import html
import io
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DPI = 144
_CSS_DPI = 96


class Described:
    """A rendered picture with its alt text. Holds PNG bytes only, so it costs no live figure."""

    __slots__ = ("alt_text", "caption", "png", "width_px")

    def __init__(self, png: bytes, alt_text: str, caption: str, width_px: int) -> None:
        self.png = png
        self.alt_text = alt_text
        self.caption = caption
        self.width_px = width_px

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the PNG and returns its path."""
        target = Path(path)
        target.write_bytes(self.png)
        return target

    def _repr_html_(self) -> str:
        source = base64.b64encode(self.png).decode("ascii")
        caption = f"<figcaption>{html.escape(self.caption)}</figcaption>" if self.caption else ""
        # White behind: axis labels must stay legible under a dark theme. max-width keeps a phone from scrolling.
        return (
            f'<figure style="margin:0"><img src="data:image/png;base64,{source}" alt="{html.escape(self.alt_text)}" '
            f'width="{self.width_px}" style="max-width:100%;height:auto;background:#fff">{caption}</figure>'
        )

    def __repr__(self) -> str:
        return f"[figure: {self.alt_text}]" + (f"\n{self.caption}" if self.caption else "")

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        return {"text/html": self._repr_html_(), "text/plain": repr(self)}


def describe(drawn: Figure | Axes, alt_text: str, *, caption: str = "") -> Described:
    """Renders a figure, or the figure that axes are in, at 144 dots per inch, closes it, and returns the picture.

    `alt_text` says what a reader who cannot see the picture needs to know (its finding, with figures); `caption` is
    shown to everybody. The same figure gives the same bytes on one machine. Raises ValueError for an empty alt text.
    Not safe while another thread draws.
    """
    from matplotlib import pyplot
    from matplotlib.figure import Figure

    if not alt_text.strip():
        raise ValueError("a figure needs alt text; say in a sentence or two what it shows")
    fig = drawn if isinstance(drawn, Figure) else drawn.get_figure(root=True)
    if fig is None:
        raise ValueError("these axes were removed from their figure; describe the figure itself")
    out = io.BytesIO()
    # No Software entry: the bytes of an unchanged figure do not change with matplotlib's version.
    fig.savefig(out, format="png", dpi=_DPI, bbox_inches="tight", pad_inches=0.05, metadata={"Software": None})
    pyplot.close(fig)  # else the notebook's own backend shows it a second time
    png = out.getvalue()
    width = int.from_bytes(png[16:20], "big")  # the IHDR chunk comes first in every PNG
    return Described(png, " ".join(alt_text.split()), " ".join(caption.split()), round(width * _CSS_DPI / _DPI))
