"""The page that shows the platform: what it is given, what it is drawn with, and that looking at it wakes nothing. How it looks in a
browser is in browser/test_11_dashboard_page.py. Chapter 11."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from serving_world import KEY, World, open_world

import sllm_mini.serving.dashboard as dashboard
from sllm_mini.cluster.api import Ask
from sllm_mini.errors import SllmError
from sllm_mini.lab.figure import Described
from sllm_mini.lab.platform.panel import Panel
from sllm_mini.lab.style import PALETTE
from sllm_mini.lab.table import Table
from sllm_mini.types import Warmth

FOLDER = Path(dashboard.__file__).parent


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with open_world(tmp_path_factory.mktemp("dashboard"), api_keys=(KEY,)) as opened:
        yield opened


def test_the_page_and_what_it_is_drawn_with_come_from_here_without_a_key(world: World) -> None:
    world = World(world.cluster, world.server, world.source)
    page = world.send("GET", "/dashboard")
    assert page.status == 200 and page.headers["content-type"].startswith("text/html")
    policy = dict(part.strip().split(" ", 1) for part in page.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'" and policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'" and policy["frame-ancestors"] == "'none'"
    fetched = re.findall(r'(?:src|href)="([^"]+)"', page.body.decode())
    assert {f"/{each}" for each in fetched if not each.startswith("data:")} == dashboard.FILES.keys() - {"/dashboard"}
    for path, (_, kind) in dashboard.FILES.items():
        found = world.send("GET", path)
        assert found.status == 200 and found.headers["content-type"].startswith(kind) and found.headers["x-content-type-options"] == "nosniff"
        assert b"<script>" not in found.body and b" style=" not in found.body and b"onclick" not in found.body  # the policy would refuse them
    assert world.send("GET", "/admin/ps").code == "invalid_api_key"


def test_nothing_that_comes_is_read_as_html() -> None:
    script = (FOLDER / "page.js").read_text()
    for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function", "DOMParser"):
        assert way not in script


def test_the_colours_are_those_of_the_chapters() -> None:
    styles = (FOLDER / "page.css").read_text()
    for role in (*(warmth.name.lower() for warmth in Warmth), "disk"):
        assert f"--{role}: {PALETTE[role]};" in styles


def test_looking_wakes_nothing_and_counts_what_was_asked(world: World) -> None:
    def told() -> dict[str, Any]:
        return dict(world.send("GET", "/admin/ps").document["requests"])

    log = len(list(world.cluster.log()))
    for _ in range(5):
        found = world.send("GET", "/admin/ps").document
    assert found["instances"] == [] and len(list(world.cluster.log())) == log
    before = told()
    assert not sum(before.pop("cold_starts").values()) and not any(before.values())
    assert world.complete().status == 200 and world.complete().status == 200
    assert world.cluster.wait(lambda cluster: cluster.metrics().outcomes.get("answered", 0) == 2, 30.0)
    after = told()
    assert (after["answered"], after["failed"], after["running"], after["waiting"]) == (2, 0, 0, 0)
    assert sum(after["cold_starts"].values()) == 1


def test_the_panel_of_a_notebook_has_every_stretch_of_time_once(tmp_path: Path) -> None:
    with open_world(tmp_path, kind="inprocess:2", devices=1) as world, Panel(world.cluster) as panel:
        def ask(model: str) -> None:
            for _ in world.cluster.submit(Ask(model, [5, 6, 7], max_new_tokens=100, stop_at_eos=False)):
                pass

        assert panel.render()[-1] is not None and not panel.spans
        for model in ("a", "b.2"):
            ask(model)
        assert world.cluster.wait(lambda _: sum(span.name.endswith(" idle") for span in panel.spans) == 2, 30.0)
        follow, shown = panel.widget().children
        assert follow.description
        follow.value, before = True, shown.value
        ask("a")
        assert world.cluster.wait(lambda _: shown.value != before, 30.0)
        follow.value = False
        assert world.cluster.wait(lambda _: not any(thread.name == "sllm-panel-draw" for thread in threading.enumerate()), 30.0)
        panel.stop()
        panel.stop()
        spans = panel.spans
        drawn, *tables = panel.render()
        assert isinstance(drawn, Described) and "a serves" in drawn.alt_text and len(tables) == 2 and all(isinstance(table, Table) for table in tables)
    for lane in {span.lane for span in spans}:
        own = sorted((span for span in spans if span.lane == lane), key=lambda span: span.start)
        assert all(before.end <= after.start for before, after in pairwise(own))
        model = own[0].name.split()[0]
        assert {span.name for span in own} <= {f"{model} climbs", f"{model} serves", f"{model} idle"}
    assert {span.lane for span in spans} == {"node-0000", "node-0001"}
    assert not any(thread.name.startswith("sllm-panel") for thread in threading.enumerate())


def test_the_panel_outlives_its_cluster(tmp_path: Path) -> None:
    with open_world(tmp_path, names=("a",)) as world:
        panel = Panel(world.cluster)
        panel.look()
    panel.start()
    panel.stop()
    with pytest.raises(SllmError):
        panel.look()
    assert len(panel.render()) == 1
