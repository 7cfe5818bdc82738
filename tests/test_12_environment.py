"""conda's environment and Binder's name what pyproject.toml names: the same packages, the same lowest versions, and nothing besides."""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
CONDA = {"torch": "pytorch", "msgspec": "msgspec-python", "xxhash": "python-xxhash", "prometheus-client": "prometheus_client"}
"""conda-forge's names where they are others than PyPI's."""
OF_THE_ENVIRONMENT = {"python", "pip"}


def needed() -> dict[str, str]:
    """By conda's name: the lowest version."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *extras["lab"], *extras["serve"], *(line for line in extras["dev"] if line.startswith("openai"))]
    found = dict(line.split(">=") for line in lines)
    return {CONDA.get(name, name): version for name, version in found.items()}


def named(path: Path) -> dict[str, str]:
    document: dict[str, Any] = yaml.safe_load(path.read_text())
    assert document["channels"] == ["conda-forge"]
    lines = [line for line in document["dependencies"] if isinstance(line, str)]
    assert all(re.fullmatch(r"[\w.-]+(>=[\d.]+(,<[\d.]+)?)?", line) for line in lines), lines
    return {line.partition(">=")[0]: line.partition(">=")[2] for line in lines}


@pytest.mark.parametrize(("path", "torch"), [("environment.yml", "pytorch"), (".binder/environment.yml", "pytorch-cpu")])
def test_an_environment_has_what_the_package_needs_and_no_more(path: str, torch: str) -> None:
    found, wanted = named(ROOT / path), needed()
    wanted[torch] = wanted.pop("pytorch")
    python = found.pop("python")
    assert {name: version for name, version in found.items() if name not in OF_THE_ENVIRONMENT} == wanted
    lowest = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"].removeprefix(">=")
    assert python.partition(",")[0] == lowest


def test_the_package_itself_is_installed_without_what_it_needs() -> None:
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"][-1]["pip"]
    assert conda == ["--no-deps --editable ."]
    binder = ROOT / ".binder" / "postBuild"
    assert "pip install --no-deps --editable ." in binder.read_text() and os.access(binder, os.X_OK)
    assert "CPU tour" in (ROOT / ".binder" / "environment.yml").read_text()
    for path in ("environment.yml", ".binder/environment.yml"):
        assert "not been tried" in (ROOT / path).read_text()
