"""The survey as a page of the book: one table for each kind of row, with links to the chapters that rebuild the idea."""

from __future__ import annotations

import re
from pathlib import Path

from sllm_mini.lab.survey import KINDS, SurveyRow, load_survey

_TITLES = {"paper": "Research systems", "open source": "Open source", "provider": "Providers of serverless functions"}
_HEAD = "| system | what it does | rungs | reported figure | source, and how far to trust it | chapters |\n|---|---|---|---|---|---|"
_WORDS = """# The survey

Who shortens cold starts, and which rung of the warmth ladder each of them attacks. Figures are as their sources report them, on their own
hardware and workloads: they are not comparable with each other, nor with what a chapter measures. The last column leads to where the idea is rebuilt.
"""


def survey_page() -> str:
    """Markdown. Raises what `load_survey` raises."""
    chapters = {path.name[:2]: path.stem for path in Path(__file__).resolve().parents[3].glob("chapters/[0-9][0-9]_*.ipynb")}
    rows = load_survey()
    parts = [_WORDS]
    for kind in KINDS:
        lines = "\n".join(_line(row, chapters) for row in rows if row.kind == kind)
        parts.append(f"## {_TITLES[kind]}\n\n{_HEAD}\n{lines}\n")
    return "\n".join(parts)


def _line(row: SurveyRow, chapters: dict[str, str]) -> str:
    links = ", ".join(f"[{number}](chapters/{chapters[number]}.ipynb)" for number in map("{:02d}".format, row.chapters))
    year = "" if row.year is None else f" ({row.year})"
    cells = (row.system, row.mechanism, ", ".join(rung.name.lower() for rung in row.rungs), row.figure, f"{row.source}{year}; {row.trust}")
    return f"| {' | '.join(map(_escaped, cells))} | {links} |"


def _escaped(text: str) -> str:
    return re.sub(r"([|*_<$\[\]`])", r"\\\1", text)
