"""The store on the command line: it starts, answers, ends cleanly, and says in one sentence what it cannot do."""

from __future__ import annotations

import json
import os
import resource
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from command_line import Ended, Run
from range_server import RangeServer
from typer.testing import CliRunner

from sllm_mini.cli import main
from sllm_mini.errors import StoreError
from sllm_mini.storage import StoreClient, client

SOFT_DESCRIPTORS = 256
COMMANDS = ("register", "forget", "prefetch", "pin", "unpin", "evict", "list", "stats", "watch")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from sllm_mini.checkpoint import convert_checkpoint
    from sllm_mini.resources import resource as packaged

    return convert_checkpoint(packaged("data/models/tiny"), tmp_path_factory.mktemp("ck") / "tiny.sllm").path


def spawn(*args: str | Path) -> subprocess.Popen[str]:
    """Starts a command in a process of its own, with few descriptors allowed unless it asks for more."""

    command = [sys.executable, "-m", "sllm_mini.cli.main", *map(str, args)]
    shell = ["sh", "-c", f'ulimit -S -n {SOFT_DESCRIPTORS}; exec "$@"', "sh", *command]
    return subprocess.Popen(shell, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def first_document(process: subprocess.Popen[str]) -> dict[str, Any]:
    """What a command printed once it was ready; it goes on running."""
    assert process.stdout is not None
    text = ""
    for line in process.stdout:
        text += line
        if line == "}\n":
            return json.loads(text)
    raise AssertionError(process.communicate())


@contextmanager
def started(folder: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    process = spawn("store", "--address", folder / "s", "--folder", folder / "f", "--json", *(options or ("--dram", "64MiB")))
    try:
        yield process, first_document(process)
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A store that runs for the whole module."""
    folder = tmp_path_factory.mktemp("s")
    with started(folder, "--dram", "64MiB", "--chunk", "2MiB", "--disk", "50MB") as (_, found):
        yield found["address"]


# --- the process ---


def test_a_store_says_where_it_listens_and_ends_when_told(tmp_path: Path, run: Run) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        with started(tmp_path) as (process, found):
            assert found == {"address": str(tmp_path / "s"), "pid": process.pid, "folder": str(tmp_path / "f"), "policy": "gdsf", "places": [{"place": "dram", "budget_nbytes": 64 << 20}]}
            assert stat.S_IMODE(os.stat(tmp_path / "s").st_mode) == 0o600
            soft, hard = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
            assert soft == hard > SOFT_DESCRIPTORS

            second = run("store", "--dram", "64MiB", "--address", tmp_path / "s")
            assert (second.code, second.out) == (1, "") and second.err.count("\n") == 1
            assert "a server listens there already" in second.err

            process.send_signal(number)
            assert (process.communicate(timeout=30), process.returncode) == (("", ""), 0)
            assert not (tmp_path / "s").exists()


def test_it_ends_under_a_client_whose_tensors_live_on(tmp_path: Path, checkpoint: Path) -> None:
    with started(tmp_path) as (process, found):
        store = StoreClient(found["address"])
        store.register("tiny", checkpoint)
        tensors = store.attach("tiny").wait()
        before = {name: tensor.float().sum().item() for name, tensor in tensors.items()}
        process.terminate()
        assert (process.communicate(timeout=30), process.returncode) == (("", ""), 0)
        assert {name: tensor.float().sum().item() for name, tensor in tensors.items()} == before


def test_a_killed_store_is_replaced_at_the_same_address(tmp_path: Path, run: Run) -> None:
    with started(tmp_path) as (process, _):
        process.kill()
        process.wait()
        assert (tmp_path / "s").exists()
        asked = run("store", "list", "--address", tmp_path / "s")
        assert (asked.code, asked.err) == (1, f"Error: no store answers at {tmp_path / 's'}; start one with: sllm-mini store --dram 8GiB --address {tmp_path / 's'}\n")
    with started(tmp_path):
        assert run("store", "list", "--address", tmp_path / "s").out == "No model is registered.\n"


# --- the commands ---


def test_a_model_goes_through_its_life(run: Run, address: str, checkpoint: Path) -> None:
    def ask(*args: str | Path, code: int = 0) -> dict[str, Any]:
        ended = run("store", *args, "--address", address, "--json")
        assert ended.code == code and (ended.err == "" if code == 0 else ended.out == "")
        return ended.document if code == 0 else json.loads(ended.err)["error"]

    model = ask("register", "life", checkpoint)
    nbytes = model["nbytes"]
    assert model == {"name": "life", "source": str(checkpoint), "nbytes": nbytes, "layers": 8, "uses": 0, "places": []}
    assert ask("list")["models"] == [model]

    brought = ask("prefetch", "life")
    assert (brought["name"], brought["place"]) == ("life", "dram") and brought["seconds"] > 0
    held = {"place": "dram", "nbytes": nbytes, "leases": 0, "pinned": False, "loading": False}
    assert ask("list")["models"][0]["places"] == [held]
    figures = ask("stats")
    used = figures["places"][0]["used_nbytes"]
    assert used == -(-nbytes // (2 << 20)) * (2 << 20)
    assert figures["places"][0] == {"place": "dram", "budget_nbytes": 64 << 20, "used_nbytes": used, "kernel_nbytes": used, "ready_nbytes": 0, "trouble": ""}
    assert figures["moved_nbytes"] == {"disk->dram": nbytes}

    assert ask("pin", "life", "dram") == {"name": "life", "place": "dram", "pinned": True}
    error = ask("evict", "life", "dram", code=1)
    assert (error["type"], error["message"]) == ("StoreError", "life stays in dram: it is pinned")
    assert ask("unpin", "life", "dram")["pinned"] is False
    assert ask("evict", "life", "dram") == {"name": "life", "place": "dram", "nbytes": used}
    assert ask("stats")["evicted_nbytes"] == {"dram": used}
    assert ask("forget", "life") == {"name": "life"}
    assert ask("list") == {"models": []}


def test_the_same_for_people(run: Run, address: str, checkpoint: Path) -> None:
    def ask(*args: str | Path) -> str:
        ended = run("store", *args, "--address", address)
        assert (ended.code, ended.err) == (0, "")
        return ended.out

    assert ask("register", "seen", checkpoint) == f"Registered seen: 8 layers, 10.2 MB, from {checkpoint}\n"
    assert "\nseen  10.2 MB     0  –" in ask("list")
    assert ask("prefetch", "seen").startswith("seen is in dram, ")
    assert ask("prefetch", "seen", "--to", "disk") == "seen is a local folder: nothing had to be copied to the disk\n"
    assert ask("pin", "seen", "dram") == "seen is pinned in dram\n"
    assert "  dram 10.2 MB (pinned)  " in ask("list")
    stats = ask("stats")
    assert "dram   67.1 MB  10.5 MB    0 B         10.5 MB" in stats and "disk   50.0 MB      0 B    0 B             0 B" in stats
    assert "moved disk → dram" in stats
    assert ask("unpin", "seen", "dram") == "seen may be evicted from dram again\n"
    assert ask("evict", "seen", "dram") == "Evicted 10.5 MB of seen from dram\n"
    assert ask("forget", "seen") == "Forgot seen\n"


def test_a_remote_model_is_brought_to_the_disk(run: Run, address: str, checkpoint: Path) -> None:
    with RangeServer(checkpoint) as server:
        secret = server.url.replace("//", "//me:secret@")
        shown = [run("store", "register", "far", secret, "--address", address), run("store", "list", "--address", address)]
        shown += [run("store", "register", "far", secret, "--address", address, "--json"), run("store", "list", "--address", address, "--json")]
        assert all((one.code, one.err) == (0, "") and server.url.replace("//", "//***@") in one.out and "secret" not in one.out for one in shown)
        ended = run("store", "prefetch", "far", "--to", "disk", "--address", address, "--json")
        assert ended.code == 0 and ended.document["place"] == "disk"
        assert "disk 10.2 MB  " in run("store", "list", "--address", address).out
    found = {place["place"]: place["used_nbytes"] for place in run("store", "stats", "--address", address, "--json").document["places"]}
    assert found["disk"] >= sum(file.stat().st_size for file in checkpoint.glob("data-*"))
    assert run("load", "far", "--store", "--address", address).code == 0  # its server is gone
    assert run("store", "forget", "far", "--address", address).code == 0


def test_watch_prints_a_line_for_each_event(run: Run, address: str, checkpoint: Path) -> None:
    watching = {form: spawn("store", "watch", "--address", address, *form) for form in ((), ("--json",))}
    try:
        run("store", "register", "watched", checkpoint, "--address", address)
        until = time.monotonic() + 60
        lines: dict[tuple[str, ...], list[str]] = {form: [] for form in watching}
        for process in watching.values():
            assert process.stdout is not None
            os.set_blocking(process.stdout.fileno(), False)
        while not all(lines.values()):  # until both listen
            assert time.monotonic() < until
            run("store", "prefetch", "watched", "--address", address)
            run("store", "evict", "watched", "dram", "--address", address)
            time.sleep(0.2)
            for form, process in watching.items():
                assert process.stdout is not None
                lines[form] += process.stdout.readlines()
        assert set(lines[()]) <= {"loaded watched dram 10.2 MB\n", "evicted watched dram 10.5 MB\n"}
        event = json.loads(lines[("--json",)][-1])
        assert set(event) == {"what", "name", "place", "nbytes", "reason"} and event["name"] == "watched"
        for process in watching.values():
            process.send_signal(signal.SIGINT)
            process.wait(timeout=30)
            assert process.stderr is not None
            assert (process.returncode, process.stderr.read()) == (130, "Interrupted.\n")
    finally:
        for process in watching.values():
            process.kill()
            process.wait()
            for stream in (process.stdout, process.stderr):
                assert stream is not None
                stream.close()
        run("store", "forget", "watched", "--address", address)


# --- a model of the store in load and generate ---


def test_load_attaches_and_lets_go(run: Run, address: str, checkpoint: Path) -> None:
    run("store", "register", "lent", checkpoint, "--address", address)
    found = run("load", "lent", "--store", "--address", address, "--repeat", "3", "--json").document
    assert (found["name"], found["device"], found["tensor_count"], len(found["runs"])) == ("lent", "cpu", 56, 3)
    for one in found["runs"]:
        assert (one["tier"], one["reason"]) == ("dram", None) and 0 < one["attach_seconds"] <= one["seconds"]
    words = run("load", "lent", "--store", "--address", address)
    assert words.code == 0 and words.out.startswith("Attached lent to cpu: 56 tensors, 10.2 MB\n  tensors after ") and "in the store's dram" in words.out
    model = run("store", "list", "--address", address, "--json").document["models"][0]
    assert (model["uses"], model["places"][0]["leases"]) == (4, 0)
    assert run("store", "forget", "lent", "--address", address).code == 0


def test_a_model_without_room_is_loaded_by_this_process(run: Run, tmp_path: Path, checkpoint: Path) -> None:
    with started(tmp_path, "--dram", "2MiB"):
        run("store", "register", "big", checkpoint, "--address", tmp_path / "s")
        found = run("load", "big", "--store", "--address", tmp_path / "s", "--json").document
        assert found["runs"][0]["tier"] == "disk" and "no room" in found["runs"][0]["reason"]
        words = run("load", "big", "--store", "--address", tmp_path / "s")
        assert words.err.startswith("This process loads it by itself: dram has no room for big") and words.err.count("\n") == 1
        assert words.out.endswith(", loaded by this process\n")
        stats = run("store", "stats", "--address", tmp_path / "s").out
        assert "loaded elsewhere, no room  2" in stats and "attached from" not in stats


def test_what_a_place_lacks_is_told(run: Run, tmp_path: Path, checkpoint: Path) -> None:
    process = spawn("store", "--address", tmp_path / "s", "--folder", tmp_path / "f", "--json", "--dram", "64MiB", "--disk", "900000GiB")
    try:
        first_document(process)
        run("store", "register", "tiny", checkpoint, "--address", tmp_path / "s")
        asked = run("store", "prefetch", "tiny", "--to", "cuda:7", "--address", tmp_path / "s")
        assert (asked.code, asked.err) == (1, "Error: the store has no place 'cuda:7'; it has dram, disk; start it with --device cuda:7=SIZE\n")
        watching = StoreClient(tmp_path / "s").events()
        process.terminate()
        _, told = process.communicate(timeout=30)
        assert told.count("\n") == 1 and told.startswith(f"The disk of {tmp_path / 'f'} has ") and "less than the budget of 966 TB" in told
        with pytest.raises(StoreError, match=f"the store at {tmp_path / 's'} was stopped or died; start it and ask again"):
            next(watching)
    finally:
        process.kill()
        process.communicate()


def test_generate_on_the_stores_memory_says_the_same(run: Run, address: str, checkpoint: Path) -> None:
    run("store", "register", "said", checkpoint, "--address", address)
    options = ("--prompt", "Once upon a time", "-n", "12", "--json")
    own = run("generate", checkpoint, *options).document
    for _ in ("still loading", "resident"):
        found = run("generate", "said", "--store", "--address", address, *options).document
        assert (found["token_ids"], found["text"]) == (own["token_ids"], own["text"])
    assert run("store", "list", "--address", address, "--json").document["models"][0]["uses"] == 2


# --- what it refuses ---


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("store",), "a store needs a budget"),
        (("store", "--dram", "lots"), '"lots" is not a size'),
        (("store", "--dram", "1MiB"), "smaller than one chunk"),
        (("store", "--dram", "8MiB", "--chunk", "3MB"), "a chunk cannot have 3,000,000 bytes"),
        (("store", "--dram", "8MiB", "--policy", "fifo"), """'--policy': "fifo" is none of gdsf, lru, lfu, prefix"""),
        (("store", "--dram", "8MiB", "--backed", "9MiB"), "back at most the budget"),
        (("store", "--disk", "8MiB", "--backed", "1MiB"), "backed_nbytes is a part of dram_nbytes"),
        (("store", "--dram", "8MiB", "--huge-pages", "yes"), """'--huge-pages': "yes" is none of auto, hugetlb, never"""),
        (("store", "--device", "cuda:0"), "cuda:0=20GiB"),
        (("store", "--device", "cuda:0=1GiB", "--device", "cuda:0=2GiB"), "two budgets"),
        (("store", "--dram", "8MiB", "list"), "--dram stands before list"),
        (("store", "--address", "x", "list"), "--address stands before list"),
        (("store", "nonsense"), "nonsense"),
        (("store", "pin", "a"), "PLACE"),
        (("load", "a", "--address", "x"), "use it with --store"),
        (("load", "a", "--store", "--cold"), "without --cold"),
        (("generate", "a", "--prompt", "x", "--address", "x"), "use it with --store"),
    ],
)
def test_wrong_usage_is_2(run: Run, args: tuple[str, ...], words: str) -> None:
    ended = run(*args)
    assert (ended.code, ended.out) == (2, "") and words in ended.err and "Traceback" not in ended.err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("store", "prefetch", "nobody"), "no model is registered as 'nobody'"),
        (("store", "register", "a/b", "{ck}"), "'a/b' is not a name for a model"),
        (("store", "register", "a", "{tmp}/nothing"), "{tmp}/nothing: there is no such directory"),
        (("store", "register", "a", "http://127.0.0.1:1/a"), "http://127.0.0.1:1 refuses the connection; is a server running there?"),
        (("store", "register", "a", "hf://a"), "Error: hf://a is not an address; write hf://OWNER/NAME"),
        (("store", "pin", "nobody", "dram"), "no model is registered as 'nobody'"),
        (("store", "evict", "nobody", "dram"), "no model is registered as 'nobody'"),
        (("load", "nobody", "--store"), "no model is registered as 'nobody'"),
        (("generate", "nobody", "--store", "--prompt", "x"), "no model is registered as 'nobody'"),
    ],
)
def test_an_error_of_the_store_is_one_sentence_and_1(run: Run, address: str, tmp_path: Path, checkpoint: Path, args: tuple[str, ...], words: str) -> None:
    asked = [arg.format(ck=checkpoint, tmp=tmp_path) for arg in args]
    plain = run(*asked, "--address", address)
    assert (plain.code, plain.out) == (1, "") and plain.err.count("\n") == 1
    assert plain.err.startswith("Error: ") and words.format(tmp=tmp_path) in plain.err
    error = json.loads(run(*asked, "--address", address, "--json").err)["error"]
    assert f"Error: {error['message']}\n" == plain.err


@pytest.mark.parametrize("args", [*((command, "n", "p") if command in ("pin", "unpin", "evict", "register") else (command, "n") if command in ("forget", "prefetch") else (command,) for command in COMMANDS)])
def test_without_a_store_every_command_says_how_to_start_one(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: tuple[str, ...]) -> None:
    monkeypatch.setenv("SLLM_MINI_STORE", str(tmp_path / "none"))
    ended = run("store", *args)
    assert ended == Ended(1, "", f"Error: no store answers at {tmp_path / 'none'}; start one with: sllm-mini store --dram 8GiB\n")


@pytest.mark.parametrize("command", ["store", *(f"store {command}" for command in COMMANDS)])
def test_every_command_explains_itself(command: str) -> None:
    shown = CliRunner().invoke(main.app, [*command.split(), "-h"], env={"COLUMNS": "80"})
    options = shown.output.partition("Options:")[2]
    assert shown.exit_code == 0 and "--json" in options and "--address" in options and "-h, --help" in options
    assert max(map(len, shown.output.splitlines())) <= 80
    assert "..." not in options.partition("Commands:")[2], "a one-line help is too long for 80 columns"


# --- where it listens by default ---


def test_the_default_address_lies_where_only_this_user_may_look(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SLLM_MINI_STORE", "/somewhere/else")
    assert client.default_address() == "/somewhere/else"
    monkeypatch.delenv("SLLM_MINI_STORE")

    tmp_path.chmod(0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert client.default_address() == str(tmp_path / "sllm-mini-store.sock")

    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o770)
    own = Path(f"/tmp/sllm-mini-{os.geteuid()}")
    for unsafe in ("", str(tmp_path / "none"), str(tmp_path / "link"), str(tmp_path / "open")):
        monkeypatch.setenv("XDG_RUNTIME_DIR", unsafe)
        assert client.default_address() == str(own / "sllm-mini-store.sock")
    assert stat.S_IMODE(own.lstat().st_mode) == 0o700 and own.lstat().st_uid == os.geteuid()


def test_a_folder_that_somebody_else_made_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLLM_MINI_STORE", raising=False)
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    uid = 900_000_000 + os.getpid()
    monkeypatch.setattr(client.os, "geteuid", lambda: uid)
    squatted = Path(f"/tmp/sllm-mini-{uid}")  # made by this test's user, so not by the user of that number
    squatted.mkdir(0o700)
    try:
        with pytest.raises(StoreError, match=f"{squatted} is not a folder that only this user may open"):
            client.default_address()
    finally:
        squatted.rmdir()
