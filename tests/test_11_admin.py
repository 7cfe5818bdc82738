"""Models that come, change and go while a server runs: over HTTP and from the command line, and what neither lets anybody do. Chapter 11."""

from __future__ import annotations

import http.server
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from command_line import Ended, run_command
from range_server import RangeServer
from serving_world import KEY, Reply, World, open_world

from sllm_mini.checkpoint import convert_checkpoint, open_checkpoint
from sllm_mini.cluster.api import Deployment, NodeReport, StoreReport
from sllm_mini.cluster.opening import open_cluster
from sllm_mini.cluster.simulated.run import even_cluster
from sllm_mini.control.messages import ModelSpec
from sllm_mini.resources import resource
from sllm_mini.serving.deployments import check_room, confined
from sllm_mini.serving.errors import ApiError
from sllm_mini.serving.server import Server
from sllm_mini.types import Tier

SECONDS = 30.0


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with open_world(tmp_path_factory.mktemp("admin"), names=("a",)) as opened:
        convert_checkpoint(resource("data/models/tiny"), opened.source.parent / "deep" / "other.sllm")
        yield opened


@pytest.fixture
def name(world: World) -> Iterator[str]:
    """Of a model that is this test's own."""
    yield "own"
    world.cluster.delete("own")


def put(world: World, name: str, **fields: Any) -> Reply:
    return world.send("PUT", f"/admin/models/{name}", fields)


def post(world: World, name: str, what: str, **fields: Any) -> Reply:
    return world.send("POST", f"/admin/models/{name}/{what}", fields)


def model(world: World, name: str) -> dict[str, Any]:
    (found,) = (each for each in world.send("GET", "/admin/ps").document["models"] if each["name"] == name)
    return dict(found)


def state(world: World, name: str) -> str:
    return str(model(world, name)["state"])


def until(world: World, what: Callable[[], bool]) -> None:
    assert world.cluster.wait(lambda _: what(), SECONDS)


def test_a_model_comes_changes_and_goes(world: World, name: str) -> None:
    reply = put(world, name, source="tiny.sllm", concurrency=2)
    assert reply.status == 201 and reply.document["source"] == str(world.source) and reply.document["nbytes"] > 1 << 20
    assert world.complete(model=name).status == 200 and name in [each["id"] for each in world.send("GET", "/v1/models").document["data"]]
    reply = put(world, name, max_instances=3, keep_alive="1h30m")
    found = reply.document
    assert (reply.status, found["concurrency"], found["max_instances"], found["keep_alive"], found["source"]) == (200, 2, 3, 5400.0, str(world.source))
    assert put(world, name, source="deep/other.sllm", keep_alive="policy").document["keep_alive"] is None
    reply = world.send("DELETE", f"/admin/models/{name}")
    assert reply.status == 202 and reply.document == {"id": name, "object": "model", "deleted": True}
    for refused in (world.complete(model=name), world.send("DELETE", f"/admin/models/{name}"), *(post(world, name, what) for what in ("load", "unload", "pin"))):
        assert (refused.status, refused.code) == (404, "model_not_found")


def test_what_runs_is_shown(world: World) -> None:
    world.complete()
    document = world.send("GET", "/admin/ps").document
    (instance,) = (each for each in document["instances"] if each["model"] == "a")
    assert (instance["node"], instance["warmth"], instance["climbing_to"]) == ("node-0000", "ready", None)
    assert (state(world, "a"), model(world, "a")["instances"], model(world, "a")["cached"]) == ("ready", 1, {"node-0000": "dram"})
    (node,) = document["nodes"]
    assert node["alive"] and node["store"]["dram_used_nbytes"] > 0 and node["reason"] == ""
    until(world, lambda: next(each for each in world.send("GET", "/admin/ps").document["instances"] if each["model"] == "a")["ends_in_seconds"] is not None)


@pytest.mark.parametrize("source", [
    "", "/", ".", "..", "../x", "deep/../tiny.sllm", "/etc", "/proc/self/root", "tiny.sllm\0", "tiny.sllm\n", "nothing", "out", "out/passwd", "around",
    "file:///etc", "FILE:/etc", "file:tiny.sllm", "https://example.org/m", "s3://b/m", "simplecache::https://example.org/m", "local:///etc", "memory://x", "a" * 3000, "x/" * 2000, "\ud800",
])  # fmt: skip
def test_no_other_folder_is_read(world: World, source: str) -> None:
    root = world.source.parent
    for link, target in (("out", "/etc"), ("around", "around")):
        if not os.path.islink(root / link):
            os.symlink(target, root / link)
    with pytest.raises(ApiError) as refused:
        confined(source, (str(root),), allow_remote=False)
    assert refused.value.status == 400 and refused.value.param == "source" and "passwd" not in refused.value.message.replace(source, "")
    if source.isprintable():
        reply = put(world, "own", source=source)
        assert (reply.status, reply.document["error"]["param"]) == (400, "source") and "own" not in [each.spec.name for each in world.cluster.models()]


def test_folders_below_a_root_are_read_whatever_leads_there(world: World, tmp_path: Path) -> None:
    root = world.source.parent
    os.symlink(root, tmp_path / "root")
    os.symlink(world.source, tmp_path / "model")
    for given in ("tiny.sllm", "./tiny.sllm", ".//tiny.sllm/", str(world.source), str(tmp_path / "root" / "tiny.sllm"), str(tmp_path / "model")):
        assert confined(given, (str(tmp_path / "none"), str(tmp_path / "root")), allow_remote=False) == str(world.source)
    assert confined("https://example.org/m", (), allow_remote=True) == "https://example.org/m"
    for address in ("file:///etc", "simplecache::https://example.org/m", "https://example.org/\0", "ftp://example.org"):
        with pytest.raises(ApiError):
            confined(address, (), allow_remote=True)


def test_an_address_is_read_where_that_is_allowed(world: World, name: str) -> None:
    with RangeServer(world.source.parent) as origin, Server(world.cluster, replace(world.server.options, allow_remote=True)) as server:
        open_to_all = replace(world, server=server)
        reply = put(open_to_all, name, source=f"{origin.url}/tiny.sllm", tier="dram")
        assert reply.status == 201 and reply.document["nbytes"] == open_checkpoint(world.source).nbytes
        until(world, lambda: model(world, name)["cached"] == {"node-0000": "dram"})
        assert world.complete(model=name).status == 200
        reply = put(open_to_all, "nowhere", source=f"{origin.url}/nothing")
        assert (reply.status, reply.document["error"]["param"]) == (400, "source")


def test_a_folder_without_a_checkpoint_is_no_source(world: World) -> None:
    reply = put(world, "own", source="deep")
    assert (reply.status, reply.code, reply.document["error"]["param"]) == (400, "invalid_value", "source")


@pytest.mark.parametrize("name", ["a%20b", ".hidden", "%00", "a%0ab", "-x", "x" * 129, "%E2%82%AC", "a:b"])
def test_a_name_is_never_a_path(world: World, name: str) -> None:
    before = sorted(os.listdir(world.source.parent))
    reply = put(world, name, source="tiny.sllm")
    assert (reply.status, reply.document["error"]["param"]) == (400, "name")
    assert sorted(os.listdir(world.source.parent)) == before
    for path in ("..%2f..%2fetc", "a/b", "..%2f", "a/"):  # the last two: no address leads to another
        assert world.send("PUT", f"/admin/models/{path}", {"source": "tiny.sllm"}).code == "not_found"


@pytest.mark.parametrize(("fields", "param"), [
    ({}, "source"), ({"source": 5}, "source"), ({"source": "tiny.sllm", "min_instances": -1}, "min_instances"), ({"source": "tiny.sllm", "min_instances": "1"}, "min_instances"),
    ({"source": "tiny.sllm", "min_instances": 2, "max_instances": 1}, None), ({"source": "tiny.sllm", "concurrency": 10**9}, "concurrency"), ({"source": "tiny.sllm", "devices": 0}, "devices"),
    ({"source": "tiny.sllm", "keep_alive": "soon"}, "keep_alive"), ({"source": "tiny.sllm", "keep_alive": True}, "keep_alive"), ({"source": "tiny.sllm", "tier": "device"}, "tier"), ({"source": "tiny.sllm", "mini_instances": 1}, None),
])  # fmt: skip
def test_what_cannot_be_is_refused_by_its_field(world: World, fields: dict[str, Any], param: str | None) -> None:
    reply = put(world, "own", **fields)
    assert (reply.status, reply.code) == (400, "invalid_value") and str(reply.document["error"]["param"]).partition(".")[0] == str(param)
    assert "mini_instances" not in reply.document["error"]["message"]


def test_bodies_are_json_and_may_be_left_out_where_nothing_need_be_said(world: World) -> None:
    for method, path in (("PUT", "/admin/models/a"), ("POST", "/admin/models/a/unload"), ("POST", "/admin/models/a/pin")):
        assert world.send(method, path, b"{}", content_type="text/plain").code == "unsupported_media_type"
        assert world.send(method, path, b"{").code == "invalid_json"
    assert world.send("PUT", "/admin/models/a", b"").code == "invalid_json"
    assert world.send("POST", "/admin/models/a/unload", b"").status == 200
    assert post(world, "a", "unload", force=True).code == "invalid_value"
    assert post(world, "a", "load", keep_alive=0).document["error"]["param"] == "keep_alive"


def test_a_model_is_loaded_put_away_and_pinned(world: World, name: str) -> None:
    put(world, name, source="tiny.sllm")
    assert state(world, name) == "cold"
    reply = post(world, name, "load", warmth="device")
    assert reply.status == 200 and reply.document["state"] in ("device", "ready")
    assert world.send("POST", f"/admin/models/{name}/load", b"").document["state"] == "ready"
    assert post(world, name, "unload").status == 200
    until(world, lambda: state(world, name) == "cold")
    assert post(world, name, "pin").document["min_instances"] == 1
    until(world, lambda: state(world, name) == "ready")
    post(world, name, "unload")
    world.cluster.nodes()  # all that was decided before is done
    assert state(world, name) == "ready"
    assert post(world, name, "pin", min_instances=0).document["min_instances"] == 0
    post(world, name, "unload")
    until(world, lambda: state(world, name) == "cold")


def test_a_deployment_says_how_long_its_instances_stay(world: World, name: str) -> None:
    put(world, name, source="tiny.sllm", keep_alive=0)
    world.complete(model=name)
    until(world, lambda: state(world, name) == "cold")
    put(world, name, keep_alive="1h")
    world.complete(model=name)
    until(world, lambda: [each["ends_in_seconds"] for each in world.send("GET", "/admin/ps").document["instances"] if each["model"] == name] != [None])
    (ends,) = (each["ends_in_seconds"] for each in world.send("GET", "/admin/ps").document["instances"] if each["model"] == name)
    assert 3000 < ends <= 3600
    put(world, name, keep_alive="policy")
    until(world, lambda: next(each["ends_in_seconds"] for each in world.send("GET", "/admin/ps").document["instances"] if each["model"] == name) <= 600)


def stored(world: World, name: str) -> Any:
    """A model as the store of the one node has it, None where it has not."""
    agent: Any = world.cluster._loop.carry.handles["node-0000"]  # type: ignore[attr-defined]
    return next((each for each in agent.store.models() if each.name == name), None)


def pins(world: World, name: str) -> list[str]:
    return [each.place for each in stored(world, name).places if each.pinned]


def test_weights_are_kept_in_a_tier_and_dropped_with_the_model(world: World, name: str) -> None:
    """Before any instance starts, and against whatever wants their room; a deleted model gives it back."""
    starts = world.cluster.metrics().starts
    assert put(world, name, source="tiny.sllm", tier="dram").document["tier"] == "dram"
    until(world, lambda: model(world, name)["cached"] == {"node-0000": "dram"})
    assert world.cluster.metrics().starts == starts and pins(world, name) == ["dram"]
    assert put(world, name, concurrency=3).document["tier"] == "dram" and pins(world, name) == ["dram"]
    assert put(world, name, tier="none").document["tier"] is None and pins(world, name) == []
    assert post(world, name, "pin", tier="dram").document["min_instances"] == 0 and pins(world, name) == ["dram"]
    world.send("DELETE", f"/admin/models/{name}")
    until(world, lambda: stored(world, name) is None)


def test_a_tier_that_no_store_has_room_in_is_refused() -> None:
    (spec,) = even_cluster(1)
    nodes = [NodeReport(name, True, 1, spec, store=StoreReport(0, dram, 0, 0, 0)) for name, dram in (("x", 10), ("y", 50))]
    for nbytes, tier, source, fits in ((50, Tier.DRAM, "/m", True), (51, Tier.DRAM, "/m", False), (51, Tier.DISK, "/m", True), (51, Tier.DISK, "https://m", False), (51, None, "/m", True)):
        deployment = Deployment(ModelSpec(name="m", nbytes=nbytes), source, tier)
        if fits:
            check_room(deployment, nodes)
            continue
        with pytest.raises(ApiError) as refused:
            check_room(deployment, nodes)
        assert (refused.value.status, refused.value.code) == (507, "out_of_space")


def test_a_request_is_found_by_its_name(world: World) -> None:
    told = world.complete().document["choices"][0]["sllm"]
    found = world.send("GET", f"/admin/requests/{told['request_id']}").document
    assert {key: found[key] for key in told} == told and (found["outcome"], found["model"], found["input_tokens"]) == ("answered", "a", 3)
    assert world.send("GET", "/admin/requests/nobody").code == "request_not_found"


def test_a_slow_deployment_holds_up_nobody_and_is_not_done_twice(world: World, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on, deploy, replies = threading.Event(), threading.Event(), world.cluster.deploy, list[Reply]()

    def slow(deployment: Deployment) -> None:
        begun.set()
        assert go_on.wait(SECONDS)
        deploy(deployment)

    monkeypatch.setattr(world.cluster, "deploy", slow)
    thread = threading.Thread(target=lambda: replies.append(put(world, name, source="tiny.sllm")))
    thread.start()
    try:
        assert begun.wait(SECONDS)
        assert (world.send("GET", "/health").status, world.complete().status, world.send("GET", "/admin/ps").status) == (200, 200, 200)
        second = put(world, name, source="tiny.sllm")
        assert (second.status, second.code, second.headers["retry-after"]) == (409, "in_use", "1")
    finally:
        go_on.set()
        thread.join()
    assert replies[0].status == 201 and put(world, name).status == 200


def test_every_route_documents_what_it_may_answer(world: World) -> None:
    paths = world.send("GET", "/openapi.json").document["paths"]
    wanted = {"401", "403", "405", "500", "503"}
    found = {(path, method): set(each["responses"]) for path, routes in paths.items() for method, each in routes.items() if path.startswith("/admin") or path == "/metrics"}
    assert len(found) == 8 and all(wanted <= each for each in found.values())
    assert all({"400", "404", "408", "409", "413", "415"} <= each for (_, method), each in found.items() if method in ("put", "post"))


@pytest.mark.parametrize("kind", ["inprocess:1", "simulated"])
def test_how_a_model_is_deployed_is_the_same_everywhere_and_survives(kind: str, tmp_path: Path, world: World) -> None:
    with open_cluster(kind, folder=tmp_path / "cluster") as cluster:
        wanted = Deployment(ModelSpec(name="m", nbytes=1), str(world.source), Tier.DRAM, 7.0)
        for keep_alive in (7.0, None, 7.0):
            cluster.deploy(Deployment(wanted.spec, wanted.source, wanted.tier, keep_alive))
        assert cluster.models() == [wanted]
        asked = [msgspec.json.decode(line)["event"] for line in cluster.log() if b"KeepAliveAsked" in line]
        assert [each["seconds"] for each in asked] == [7.0, None, 7.0]
    if kind == "inprocess:1":
        with open_cluster(kind, folder=tmp_path / "cluster", resume=True) as cluster:
            assert cluster.models() == [wanted]
            assert cluster.wait(lambda cluster: [node.cached for node in cluster.nodes()] == [{"m": Tier.DRAM}], SECONDS), "the store of a node that joins keeps it as well"
            assert cluster._loop.controller.cluster.models["m"].keep_alive == 7.0  # type: ignore[attr-defined]
    old = b'{"spec": {"name": "m", "nbytes": 1}, "source": "/m"}'
    assert msgspec.json.decode(old, type=Deployment) == Deployment(ModelSpec(name="m", nbytes=1), "/m")
    for fields in ({"tier": Tier.REMOTE}, {"keep_alive": float("nan")}):
        with pytest.raises(ValueError, match=next(iter(fields))):
            Deployment(wanted.spec, wanted.source, **fields)


# The command line


@pytest.fixture
def run(world: World, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ended]:
    monkeypatch.setenv("SLLM_MINI_SERVER", world.server.url)
    monkeypatch.delenv("SLLM_MINI_API_KEY", raising=False)
    return lambda *args: run_command(capfd, *args)


def test_the_command_line_deploys_shows_and_deletes(world: World, name: str, run: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world.source.parent / "deep")
    found = run("deploy", name, "other.sllm", "--min", 0, "--max", 2, "--concurrency", 3, "--keep-alive", "5m", "--tier", "dram", "--load", "--json").document
    assert (found["source"], found["max_instances"], found["concurrency"], found["keep_alive"], found["tier"], found["state"]) == (str(world.source.parent / "deep" / "other.sllm"), 2, 3, 300.0, "dram", "ready")
    shown = run("ps")
    (line,) = (each for each in shown.out.splitlines() if each.startswith(name))
    assert shown.code == 0 and line.split()[0] == name and "ready" in line and "node-0000 dram" in line and "alive" in shown.out
    assert [each["name"] for each in run("ps", "--json").document["models"]] == ["a", name]
    assert run("pin", name).out == f"1 instance of {name} always stays, its weights in dram\n"
    assert run("pin", name, "--min", 0, "--tier", "none").out == f"0 instances of {name} always stay\n"
    assert run("unload", name).code == 0
    until(world, lambda: state(world, name) == "cold")
    assert "cold" in next(each for each in run("ps").out.splitlines() if each.startswith(name))
    assert run("delete", name).out == f"{name} is deleted\n" and name not in [each.spec.name for each in world.cluster.models()]


@pytest.mark.parametrize(("args", "words"), [
    (("unload", "nobody"), "there is no model 'nobody'; GET /v1/models lists those that are deployed"),
    (("delete", "../etc"), "'../etc' is not a name for a model"),
    (("deploy", "own"), "source is missing"),
    (("deploy", "own", "/etc"), "is no folder below those that models may come from; they are named by --models-root"),
    (("deploy", "own", "https://example.org/m"), "was started without --allow-remote"),
    (("deploy", "own", "tiny.sllm", "--tier", "device"), "tier: Input should be 'none', 'disk' or 'dram'"),
    (("ps", "--server", "http://127.0.0.1:1"), "no server answers at http://127.0.0.1:1; start one with: sllm-mini serve DIR"),
    (("ps", "--server", "127.0.0.1:8000"), "is not the address of a server; write for example http://127.0.0.1:8000"),
    (("ps", "--server", "ftp://127.0.0.1"), "is not the address of a server"),
])  # fmt: skip
def test_each_failure_is_one_clear_sentence(run: Callable[..., Ended], args: tuple[str, ...], words: str) -> None:
    ended = run(*args)
    assert (ended.code, ended.out) == (1, "") and words in ended.err and ended.err.count("\n") == 1 and "Traceback" not in ended.err


def test_a_key_is_asked_for_and_found(world: World, run: Callable[..., Ended], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Server(world.cluster, replace(world.server.options, api_keys=(KEY,))) as server:
        assert "wants an API key; set SLLM_MINI_API_KEY, or give --api-key-file" in run("ps", "--server", server.url).err
        file = tmp_path / "keys"
        file.write_text("a-wrong-key-for-all\n")
        assert "does not know this API key" in run("ps", "--server", server.url, "--api-key-file", file).err
        file.write_text(f"{KEY}\nanother-key\n")
        assert run("ps", "--server", server.url, "--api-key-file", file).code == 0
        monkeypatch.setenv("SLLM_MINI_API_KEY", KEY)
        assert run("ps", "--server", server.url).code == 0


def test_who_is_no_server_of_ours_is_told_apart(run: Callable[..., Ended]) -> None:
    class Other(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>")

        def log_message(self, format: str, *args: object) -> None: ...

    with http.server.HTTPServer(("127.0.0.1", 0), Other) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        try:
            assert "is not a server of sllm-mini (status 200)" in run("ps", "--server", f"http://127.0.0.1:{other.server_port}").err
        finally:
            other.shutdown()
