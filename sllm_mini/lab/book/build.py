"""Builds the book: `python -m sllm_mini.lab.book.build OUT`. Needs Sphinx, myst-nb, furo and latex2mathml (`make book` installs them).

Sources are gathered in OUT/source (the pages of `book/`, the chapters, the survey and the reference), the site is OUT/html. Nothing is
executed and nothing is fetched, and a page of the site fetches nothing either. Any warning of Sphinx ends it, and so does a link that leads nowhere.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from sllm_mini.errors import SllmError
from sllm_mini.lab.book.links import problems
from sllm_mini.lab.book.reference import pages
from sllm_mini.lab.book.survey_page import survey_page

ROOT = Path(__file__).resolve().parents[3]
"""Of a checkout: the book is not part of an installation."""
_FOLDERS = ("chapters/images",)


def stage(source: Path) -> None:
    """All that Sphinx reads, anew. Raises SllmError outside a checkout."""
    if not (ROOT / "book" / "conf.py").is_file():
        raise SllmError("the book is built from a checkout of sllm_mini, and this is an installation; clone the repository")
    shutil.rmtree(source, ignore_errors=True)
    shutil.copytree(ROOT / "book", source)
    (source / "chapters").mkdir()
    for chapter in sorted((ROOT / "chapters").glob("[0-9][0-9]_*.ipynb")):
        shutil.copy(chapter, source / "chapters")
    for folder in _FOLDERS:
        shutil.copytree(ROOT / folder, source / folder)
    (source / "survey.md").write_text(survey_page())
    (source / "reference").mkdir()
    for name, text in pages().items():
        (source / "reference" / name).write_text(text)


def build(out: Path) -> Path:
    """The site's first page. Raises SllmError with what is wrong with the book."""
    stage(out / "source")
    shutil.rmtree(out / "html", ignore_errors=True)
    command = [sys.executable, "-m", "sphinx", "--builder", "html", "--fail-on-warning", "--keep-going", "--quiet", "--doctree-dir", str(out / "doctrees"), str(out / "source"), str(out / "html")]
    if subprocess.run(command).returncode:
        raise SllmError("Sphinx warns of the book; mend what it names above")
    if found := problems(out / "html"):
        raise SllmError("links of the book lead nowhere:\n" + "\n".join(found))
    return out / "html" / "index.html"


def main() -> None:
    try:
        print(f"The book: {build(Path(sys.argv[1] if len(sys.argv) > 1 else 'out/book').resolve())}")
    except SllmError as error:
        sys.exit(f"Error: {error}")


if __name__ == "__main__":
    main()
