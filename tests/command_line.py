"""`sllm-mini` as the tests of its commands run it: in this process, as the script does, with what it printed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from sllm_mini.cli import main


class Ended(NamedTuple):
    """How a command ended and what it printed."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        return json.loads(self.out)

    @property
    def error(self) -> dict[str, Any]:
        return json.loads(self.err.splitlines()[-1])["error"]


Run = Callable[..., Ended]
"""What the fixture `run` gives: called with a command's arguments, it runs the command to its end."""


def run_command(capfd: pytest.CaptureFixture[str], *args: str | int | Path) -> Ended:
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        main.main([str(arg) for arg in args])
    captured = capfd.readouterr()
    return Ended(ended.value.code if isinstance(ended.value.code, int) else 0, captured.out, captured.err)
