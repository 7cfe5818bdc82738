"""One table, drawn twice: as HTML for a notebook and as plain text for a terminal, from the same cells.

A notebook stores both, so a page read with no kernel, by a screen reader or in a terminal says the same thing.
"""

from __future__ import annotations

import html
import io
from collections.abc import Sequence
from dataclasses import dataclass

_TEXT_WIDTH = 118


@dataclass(frozen=True, slots=True)
class Table:
    """Headers and rows of text. `numeric` names the columns (by index) that are set flush right.

    `emphasis` names rows (by index) that are totals. Raises ValueError for a row of the wrong length. Immutable,
    so safe from any thread.
    """

    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""
    note: str = ""
    numeric: frozenset[int] = frozenset()
    emphasis: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        for number, row in enumerate(self.rows):
            if len(row) != len(self.headers):
                raise ValueError(
                    f"row {number} of the table has {len(row)} cells and the table has {len(self.headers)} columns; "
                    "give every row one cell per column"
                )

    def __str__(self) -> str:
        from rich import box
        from rich.console import Console
        from rich.table import Table as RichTable
        from rich.text import Text

        # Text, not markup: a cell may hold square brackets.
        grid = RichTable(box=box.SIMPLE_HEAD, title=Text(self.caption) if self.caption else None, title_justify="left")
        for column, (header, width) in enumerate(zip(self.headers, self._text_widths(), strict=True)):
            grid.add_column(Text(header), justify="right" if column in self.numeric else "left", overflow="fold", width=width)
        for number, row in enumerate(self.rows):
            grid.add_row(*map(Text, row), style="bold" if number in self.emphasis else None)
        out = io.StringIO()
        # In a notebook rich would write to the cell instead of to `out`.
        console = Console(file=out, width=_TEXT_WIDTH, color_system=None, force_jupyter=False, legacy_windows=False)
        console.print(grid)
        if self.note:
            console.print(Text(self.note))
        return "\n".join(line.rstrip() for line in out.getvalue().splitlines())

    def _text_widths(self) -> list[int]:
        """Column widths in characters: what the cells need, else long columns share what the short ones leave."""
        columns = list(zip(self.headers, *self.rows, strict=True))
        natural = [max(map(len, column)) for column in columns]
        room = _TEXT_WIDTH - 2 * len(columns) - 2
        if sum(natural) <= room:
            return natural
        least = [max(len(word) for cell in column for word in (cell.split() or [""])) for column in columns]
        # By the square root of their area, so that a column of long cells gets more lines, not all the width.
        wish = [sum(map(len, column)) ** 0.5 for column in columns]
        spare = room - sum(least)
        return [max(1, min(nat, low + int(max(spare, 0) * w / sum(wish)))) for nat, low, w in zip(natural, least, wish, strict=True)]

    def _cells(self, tag: str, cells: Sequence[str], *, bold: bool = False, scope: str = "") -> str:
        parts = []
        for column, cell in enumerate(cells):
            align = "right" if column in self.numeric else "left"
            weight = ";font-weight:bold" if bold else ""
            # White space keeps a figure and its unit on one line.
            nowrap = ";white-space:nowrap" if column in self.numeric else ""
            parts.append(
                f'<{tag}{scope} style="text-align:{align};vertical-align:top{nowrap}{weight}">{html.escape(cell)}</{tag}>'
            )
        return f"<tr>{''.join(parts)}</tr>"

    def _repr_html_(self) -> str:
        caption = (
            f'<caption style="text-align:left;font-weight:bold;padding:4px 0">{html.escape(self.caption)}</caption>'
            if self.caption
            else ""
        )
        head = self._cells("th", self.headers, scope=' scope="col"')
        body = "\n".join(self._cells("td", row, bold=number in self.emphasis) for number, row in enumerate(self.rows))
        note = f"<p><small>{html.escape(self.note)}</small></p>" if self.note else ""
        return f"<table>{caption}<thead>{head}</thead><tbody>\n{body}\n</tbody></table>{note}"

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        return {"text/html": self._repr_html_(), "text/plain": str(self)}
