"""Makes the picture in the README: `python -m sllm_mini.lab.picture FILE.png` measures one cold start and draws it.

The title carries machine and date, so the picture says what it is wherever it is shown. Costs two cold starts of the
tiny model. The same measurement, explained, is chapter 00.
"""

from __future__ import annotations

import datetime
import sys
from pathlib import Path

from sllm_mini.lab.anatomy import measure_cold_start
from sllm_mini.lab.figure import Described, describe
from sllm_mini.lab.models import tiny_checkpoint
from sllm_mini.lab.timeline import plot_timeline, timeline_alt_text


def cold_start_picture() -> Described:
    """A measured cold start of the tiny model as a picture."""
    path = tiny_checkpoint().path
    measure_cold_start(path)  # once unmeasured: the libraries' own files come from the disk only the first time
    start = measure_cold_start(path, max_new_tokens=16)
    where = f"{start.machine['cores']} cores, no GPU used"
    title = f"A cold start, {start.nbytes / 1e6:.0f} MB model ({where}, {datetime.date.today():%B %Y})"
    return describe(plot_timeline(start.spans, title=title), timeline_alt_text(start.spans, what=title))


def main(arguments: list[str]) -> int:
    """Writes the picture to the path given and prints its alt text."""
    target = Path(arguments[0])
    target.parent.mkdir(parents=True, exist_ok=True)
    picture = cold_start_picture()
    picture.save(target)
    print(picture.alt_text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
