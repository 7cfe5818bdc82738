"""A zygote forks what it has imported: each child is a process of its own in all but its libraries' pages.

Two zygotes serve all tests: one with nothing but the standard library, one with torch and transformers.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from processes import PATIENCE, children_of, is_gone, on_the_path

from sllm_mini.checkpoint import Checkpoint
from sllm_mini.cluster import (
    Child,
    ForkOptions,
    Zygote,
    ZygoteError,
    fork_from,
    memory_of,
    restore_snapshot,
    save_snapshot,
    why_no_criu,
)
from sllm_mini.cluster import zygote_process as process_module
from sllm_mini.cluster.snapshot import SnapshotError, open_snapshot
from sllm_mini.cluster.zygote import ZygoteGoneError, prepare_in
from sllm_mini.errors import UnsupportedError
from sllm_mini.lab.models import tiny_checkpoint
from sllm_mini.wire import Channel, Message, WireTimeout

PR_SET_CHILD_SUBREAPER = 36

WORKER = '''
import json, os, signal, subprocess, sys, threading, time

calls = []

def prepare():
    calls.append(os.getpid())

def report(what, *args, channel):
    """Sends what one of the functions below returns."""
    with channel:
        channel.sendall(json.dumps(globals()[what](*args)).encode())

def identity():
    return {"pid": os.getpid(), "parent": os.getppid(), "group": os.getpgid(0), "folder": os.getcwd(), "environment": dict(os.environ),
            "argv": sys.argv, "calls": calls, "frozen": __import__("gc").get_freeze_count(), "collecting": __import__("gc").isenabled(),
            "fds": {fd: os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")}}

def draw():
    import random, tempfile, uuid
    drawn = {"random": random.random(), "urandom": os.urandom(8).hex(), "uuid1": str(uuid.uuid1()), "uuid4": str(uuid.uuid4()),
             "tempfile": next(tempfile._get_candidate_names())}
    if "torch" in sys.modules:
        import numpy, torch
        drawn |= {"numpy": numpy.random.rand(), "torch": torch.rand(1).item(), "global generator": torch.initial_seed(),
                  "shuffle": torch.randperm(1000).tolist()}
    return drawn

def multiply(n, threads):
    import torch
    if threads:
        torch.set_num_threads(threads)
    a = torch.randint(-9, 9, (n, n)).float()
    for _ in range(3):
        product = a @ a
    exact = torch.equal(product.long(), a.long() @ a.long())
    return {"exact": exact, "threads": torch.get_num_threads(), "tasks": len(os.listdir("/proc/self/task")), "before": "torch" in sys.modules}

def modules():
    return sorted(sys.modules)

def echo(text, *, error=False):
    print(text, file=sys.stderr if error else sys.stdout)
    print(sys.stdin.read(), end="")

def give(status):
    return status

def leave(status):
    sys.exit(status)

def fail():
    raise ValueError("worker says no")

def named(self, path, entry):
    return [self, path, entry] != [1, "models/tiny", "x"]

def sleep(seconds=600):
    time.sleep(seconds)

def family(channel):
    grandchild = subprocess.Popen(["sleep", "600"])
    channel.sendall(json.dumps(grandchild.pid).encode())
    grandchild.wait()
    time.sleep(600)

def stubborn(channel):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    channel.sendall(b"0")
    time.sleep(600)

def skeleton(path, *, channel):
    """What a process does until it could fill a model."""
    import torch, transformers
    from sllm_mini.checkpoint import open_checkpoint
    from sllm_mini.loading.model import build_skeleton, load_model
    model = build_skeleton(open_checkpoint(path))
    channel.sendall(b"1")
    channel.recv(1)
    model = load_model(path, options=None)
    with torch.no_grad():
        total = model(torch.tensor([[1, 2, 3, 4]])).logits.double().sum().item()
    channel.sendall(json.dumps(total).encode() + b" ")
    channel.recv(1)

def converse(channel):
    from sllm_mini.wire import Channel, Message
    class Word(Message, frozen=True):
        text: str
    with Channel(channel, Word, name="parent") as parent:
        parent.send(Word(parent.receive().message.text.upper()))

def start_thread():
    threading.Thread(target=time.sleep, args=(600,), daemon=True).start()

def pretend_cuda():
    import torch
    torch.cuda.is_initialized = lambda: True
'''
NAMES = ["report", "identity", "draw", "multiply", "echo", "give", "leave", "fail", "named", "sleep", "family", "stubborn", "skeleton", "converse"]
ENTRIES = [f"zygote_worker:{name}" for name in NAMES]


@pytest.fixture(scope="module")
def search(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with on_the_path(tmp_path_factory.mktemp("worker"), "zygote_worker", WORKER) as folder:
        yield folder


@pytest.fixture(scope="module")
def plain(search: Path) -> Iterator[Zygote]:
    with Zygote(["zygote_worker:prepare"], ENTRIES) as zygote:
        yield zygote


@pytest.fixture(scope="module")
def runtime(search: Path) -> Iterator[Zygote]:
    with Zygote(entries=ENTRIES) as zygote:
        yield zygote


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def no_descriptor_is_lost() -> Iterator[None]:
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    yield
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def run(zygote: Zygote, name: str, *args: Any, **options: Any) -> tuple[int, str, str]:
    """Status, standard output and standard error of a child."""
    read_out, write_out = os.pipe()
    read_err, write_err = os.pipe()
    with open(os.devnull, "rb") as null, open(read_out) as out, open(read_err) as err:
        try:
            given = ForkOptions(stdin=options.pop("stdin", null), stdout=write_out, stderr=write_err, **options.pop("given", {}))
            child = zygote.fork(f"zygote_worker:{name}", *args, options=given, **options)
        finally:
            os.close(write_out)
            os.close(write_err)
        with child:
            texts = out.read(), err.read()
            return child.wait(PATIENCE), *texts


def ask(zygote: Zygote, what: str, *args: Any, **options: Any) -> Any:
    """What a function of the worker returns in a child."""
    ours, theirs = socket.socketpair()
    with ours, zygote.fork("zygote_worker:report", what, *args, options=ForkOptions(channel=theirs, **options)) as child:
        theirs.close()
        text = read_all(ours)
        assert child.wait(PATIENCE) == 0
    return json.loads(text)


def read_all(sock: socket.socket) -> bytes:
    return b"".join(iter(lambda: sock.recv(1 << 16), b""))


def start(zygote: Zygote, name: str, *args: Any) -> tuple[Child, socket.socket]:
    """A child with a channel, after the first thing that it said, which stays to be read."""
    ours, theirs = socket.socketpair()
    with theirs:
        child = zygote.fork(f"zygote_worker:{name}", *args, options=ForkOptions(channel=theirs))
    ours.settimeout(PATIENCE)
    ours.recv(1, socket.MSG_PEEK)
    return child, ours


# What a zygote runs itself


def test_what_a_zygote_prepared_is_in_every_child_from_then_on(search: Path) -> None:
    with Zygote([], [*ENTRIES, "zygote_worker:prepare"]) as zygote:
        before = ask(zygote, "identity")
        assert prepare_in(zygote.path, "zygote_worker:prepare") == ""
        after = ask(zygote, "identity")
        assert before["calls"] == [] and after["calls"] == [zygote.pid] == ask(zygote, "identity")["calls"]
        assert after["frozen"] >= before["frozen"] > 0 and children_of(zygote.pid) == []


def test_what_cannot_be_prepared_is_told_and_the_zygote_goes_on(plain: Zygote) -> None:
    with pytest.raises(ZygoteError, match="zygote_worker:fail failed: ValueError: worker says no"):
        prepare_in(plain.path, "zygote_worker:fail")
    with pytest.raises(ZygoteError, match="fail failed: TypeError"):
        prepare_in(plain.path, "zygote_worker:fail", 1, 2)
    with pytest.raises(ZygoteError, match="os:abort is not an entry point of this zygote"):
        prepare_in(plain.path, "os:abort")
    with pytest.raises(ValueError, match="travel as JSON"):
        prepare_in(plain.path, "zygote_worker:fail", object())
    assert run(plain, "give", 3)[0] == 3
    with pytest.raises(ZygoteGoneError, match="start a new one"):
        prepare_in(f"{plain.path}.none", "zygote_worker:fail")


def test_who_prepares_with_a_thread_is_told_that_nothing_can_be_forked_any_more(search: Path) -> None:
    with Zygote([], [*ENTRIES, "zygote_worker:start_thread"]) as zygote:
        assert "started 1 thread" in prepare_in(zygote.path, "zygote_worker:start_thread")
        with pytest.raises(ZygoteError, match="started 1 thread"):
            zygote.fork("zygote_worker:give", 1)


# A child is a process of its own


def test_arguments_go_in_and_the_status_comes_out(plain: Zygote) -> None:
    status, out, err = run(plain, "echo", "grüße\n🙂", error=False)
    assert (status, out, err) == (0, "grüße\n🙂\n", "")
    status, out, err = run(plain, "echo", {"deep": [1, 2.5, None, True]}, error=True)
    assert (status, out, err) == (0, "", "{'deep': [1, 2.5, None, True]}\n")
    assert run(plain, "give", 7)[0] == 7
    assert run(plain, "give", None)[0] == 0
    assert run(plain, "give", 256)[0] == 0  # as the kernel has it
    assert run(plain, "give", "a reason") == (1, "", "a reason\n")  # as sys.exit has it
    assert run(plain, "leave", 3)[0] == 3
    assert run(plain, "leave", None)[0] == 0


def test_arguments_may_have_the_names_of_those_of_fork(plain: Zygote) -> None:
    with plain.fork("zygote_worker:named", self=1, path="models/tiny", entry="x") as child:
        assert child.wait(PATIENCE) == 0


def test_an_exception_is_printed_by_the_child_and_ends_it_with_1(plain: Zygote) -> None:
    status, out, err = run(plain, "fail")
    assert (status, out) == (1, "")
    assert err.startswith("Traceback") and err.endswith("ValueError: worker says no\n")
    status, _, err = run(plain, "give", 1, 2, 3)
    assert status == 1 and "TypeError" in err


def test_standard_descriptors_environment_and_folder_are_the_childs_own(plain: Zygote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in").write_text("from a file")
    with open(tmp_path / "in") as file:
        assert run(plain, "echo", "then", stdin=file) == (0, "then\nfrom a file", "")
    seen = ask(plain, "identity", environment={"ONLY": "this"}, folder=tmp_path)
    assert seen["environment"] == {"ONLY": "this"}
    assert seen["folder"] == str(tmp_path)
    monkeypatch.setenv("SLLM_TEST", "of the client, now: \udcff")  # after the zygote started; not even UTF-8
    monkeypatch.chdir(tmp_path)
    inherited = ask(plain, "identity")
    assert inherited["environment"] == dict(os.environ)  # so nothing that the zygote set for its own imports
    assert inherited["folder"] == str(tmp_path)


def test_a_child_leads_its_own_group_and_holds_nothing_of_the_zygotes(plain: Zygote) -> None:
    others = [start(plain, "stubborn") for _ in range(3)]
    seen = ask(plain, "identity")
    for child, sock in others:
        child.close()
        sock.close()
    assert seen["parent"] == plain.pid
    assert seen["group"] == seen["pid"]
    assert seen["argv"] == ["zygote_worker:report"]
    sockets = [target for fd, target in seen["fds"].items() if int(fd) > 2 and target.startswith("socket:")]
    assert len(sockets) == 1  # its channel
    assert not any("pidfd" in target for target in seen["fds"].values())


def test_what_is_imported_runs_once_and_stays_out_of_collection(plain: Zygote) -> None:
    for _ in range(2):
        seen = ask(plain, "identity")
        assert seen["calls"] == [plain.pid]
        assert seen["frozen"] > 1000
        assert seen["collecting"]


def test_a_channel_carries_messages(plain: Zygote) -> None:
    class Word(Message, frozen=True):
        text: str

    ours, theirs = socket.socketpair()
    with Channel(ours, Word, name="child") as channel:
        with theirs:
            child = plain.fork("zygote_worker:converse", options=ForkOptions(channel=theirs))
        with child:
            channel.send(Word("hello"))
            assert channel.receive(PATIENCE).message == Word("HELLO")
            assert child.wait(PATIENCE) == 0


def test_two_children_draw_different_numbers(plain: Zygote, runtime: Zygote) -> None:
    for zygote in (plain, runtime):
        one, two = ask(zygote, "draw"), ask(zygote, "draw")
        assert set(one) == set(two) and len(one) == (5 if zygote is plain else 9)
        assert [name for name in one if one[name] == two[name]] == []


# Only what was allowed


@pytest.mark.parametrize("entry", ["os:system", "zygote_worker:draw2", "zygote_worker", "zygote_worker:__doc__", "zygote_worker:report.__globals__"])
def test_only_what_is_on_the_list_runs(plain: Zygote, entry: str) -> None:
    with pytest.raises(ZygoteError, match=r"is not an entry point of this zygote; it runs zygote_worker:"):
        plain.fork(entry, "touch /tmp/x")


def test_the_socket_is_this_users_alone(plain: Zygote) -> None:
    assert stat.S_IMODE(os.stat(plain.path).st_mode) == 0o600
    assert stat.S_IMODE(os.stat(os.path.dirname(plain.path)).st_mode) == 0o700


def test_another_process_may_ask_too(plain: Zygote) -> None:
    code = f"from sllm_mini.cluster import fork_from; c = fork_from({plain.path!r}, 'zygote_worker:give', 5); print(c.wait(60)); c.close()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stdout, done.stderr) == (0, "5\n", "")


# Threads and CUDA


def test_threads_before_a_fork_are_refused(search: Path) -> None:
    with pytest.raises(ZygoteError, match="the imports started 1 thread, which a fork would not copy"):
        Zygote(["zygote_worker:start_thread"])


def test_cuda_before_a_fork_is_refused(search: Path) -> None:
    with pytest.raises(ZygoteError, match="the imports initialised CUDA, which no forked process can use"):
        Zygote(["zygote_worker:pretend_cuda"])


def test_cuda_that_torch_knows_nothing_of_is_seen_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_module, "_CUDA_FILE", str(tmp_path / "uvm"))
    real = os.listdir
    monkeypatch.setattr(process_module.os, "listdir", lambda path: real(path) if path.endswith("fd") else [])  # this process may have threads
    assert process_module.why_not_forkable() is None
    with open(tmp_path / "uvm", "w"):
        assert "initialised CUDA" in (process_module.why_not_forkable() or "")


def test_the_runtime_is_imported_in_one_thread(runtime: Zygote) -> None:
    assert len(os.listdir(f"/proc/{runtime.pid}/task")) == 1
    assert {"torch", "transformers.models.auto.modeling_auto", "sllm_mini.loading.model"} <= set(ask(runtime, "modules"))


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one processor: torch starts no threads")
def test_a_child_multiplies_right_and_on_its_threads(runtime: Zygote) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    own = ask(runtime, "multiply", 512, 0, environment=environment)
    assert own["exact"] and own["before"]
    assert own["threads"] >= 2 and own["tasks"] >= own["threads"]
    fewer = ask(runtime, "multiply", 512, 0, environment=environment | {"OMP_NUM_THREADS": "1"})
    assert fewer == {"exact": True, "threads": 1, "tasks": 1, "before": True}
    more = ask(runtime, "multiply", 512, 3, environment=environment)
    assert more["exact"] and more["threads"] == 3 and more["tasks"] >= 3
    assert len(os.listdir(f"/proc/{runtime.pid}/task")) == 1


# What it is for


def test_a_fork_is_faster_and_smaller_than_a_fresh_process(runtime: Zygote, tiny: Checkpoint, search: Path) -> None:
    """From the request to a skeleton, and the memory that one more process takes then and after a forward pass."""
    code = "import socket, sys; sys.path.insert(0, sys.argv[1]); import zygote_worker; zygote_worker.skeleton(sys.argv[2], channel=socket.socket(fileno=0))"
    fork_seconds, forked, answers = [], [], []
    for _ in range(2):
        started = time.perf_counter()
        child, sock = start(runtime, "skeleton", str(tiny.path))
        fork_seconds.append(time.perf_counter() - started)
        with child, sock:
            forked.append(memory_of(child.pid))
            answers.append(finish(sock))
            forked.append(memory_of(child.pid))
            sock.sendall(b"x")
            assert child.wait(PATIENCE) == 0
    ours, theirs = socket.socketpair()
    started = time.perf_counter()
    with theirs:
        fresh = subprocess.Popen([sys.executable, "-c", code, str(search), str(tiny.path)], stdin=theirs.fileno())
    with ours:
        ours.recv(1, socket.MSG_PEEK)
        fresh_seconds = time.perf_counter() - started
        alone = memory_of(fresh.pid)
        answers.append(finish(ours))
        ours.sendall(b"x")
        assert fresh.wait(PATIENCE) == 0
    assert len(set(answers)) == 1  # the same model, bit for bit
    assert fresh_seconds > 4 * min(fork_seconds)
    assert alone.private_nbytes > 3 * forked[0].private_nbytes
    assert forked[1].private_nbytes < alone.private_nbytes
    assert all(memory.private_nbytes <= memory.proportional_nbytes <= memory.resident_nbytes for memory in forked)


def finish(sock: socket.socket) -> float:
    sock.recv(1)
    sock.sendall(b"x")
    answer = b""
    while not answer.endswith(b" "):
        answer += sock.recv(100)
    return float(answer)


def test_pages_stay_shared_until_written(runtime: Zygote) -> None:
    with runtime.fork("zygote_worker:sleep") as child:
        whole, own = memory_of(runtime.pid), memory_of(child.pid)
    assert own.private_nbytes < 0.1 * whole.resident_nbytes
    with pytest.raises(UnsupportedError, match="check that process"):
        memory_of(child.pid)


# Ends


def test_waiting_and_polling(plain: Zygote) -> None:
    with plain.fork("zygote_worker:sleep") as child:
        assert child.poll() is None
        with pytest.raises(WireTimeout):
            child.wait(0.05)
        statuses: list[int] = []
        threads = [threading.Thread(target=lambda: statuses.append(child.wait(PATIENCE))) for _ in range(3)]
        for thread in threads:
            thread.start()
        child.signal(signal.SIGTERM)
        for thread in threads:
            thread.join(PATIENCE)
        assert statuses == [-signal.SIGTERM] * 3
        assert child.poll() == child.wait() == -signal.SIGTERM
        child.signal(signal.SIGKILL)  # too late, and no harm
    child.close()
    assert child.wait() == -signal.SIGTERM


def test_a_signal_reaches_what_the_child_started(plain: Zygote) -> None:
    child, sock = start(plain, "family")
    with sock, child:
        grandchild = int(sock.recv(20))
        child.signal(signal.SIGTERM)
        assert child.wait(PATIENCE) == -signal.SIGTERM
    assert is_gone(grandchild)


def test_closing_ends_even_a_stubborn_child_and_leaves_no_zombie(plain: Zygote) -> None:
    child, sock = start(plain, "stubborn")
    with sock:
        child.signal(signal.SIGTERM)
        with pytest.raises(WireTimeout):
            child.wait(0.1)
        child.close()
    assert not os.path.exists(f"/proc/{child.pid}")
    assert child.wait() == -signal.SIGKILL
    assert children_of(plain.pid) == []


def test_many_threads_ask_at_once_and_nothing_is_left(plain: Zygote) -> None:
    def descriptors() -> int:
        return len(os.listdir(f"/proc/{plain.pid}/fd"))

    before, mine = descriptors(), len(os.listdir("/proc/self/fd"))  # at most as many as now: the last test's connection may go yet
    statuses: list[int] = []

    def work(numbers: Sequence[int]) -> None:
        for number in numbers:
            with plain.fork("zygote_worker:give", number) as child:
                statuses.append(child.wait(PATIENCE))

    threads = [threading.Thread(target=work, args=(range(first, first + 10),)) for first in (0, 10, 20, 30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert sorted(statuses) == list(range(40))
    assert children_of(plain.pid) == []
    deadline = time.monotonic() + PATIENCE
    while descriptors() > before:  # the zygote lets go of a connection after its last word
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert len(os.listdir("/proc/self/fd")) == mine


def test_a_zygote_ends_its_children_and_leaves_no_file(search: Path) -> None:
    with Zygote(entries=ENTRIES, imports=[]) as zygote:
        child, sock = start(zygote, "stubborn")
        folder = os.path.dirname(zygote.path)
        assert os.path.exists(zygote.path)
    with sock:
        assert not os.path.exists(f"/proc/{child.pid}")
        assert child.wait(PATIENCE) == -signal.SIGKILL
        child.close()
    assert not os.path.exists(folder)
    zygote.close()
    with pytest.raises(ZygoteError, match="ended with status 0"):
        zygote.fork("zygote_worker:give", 1)
    with pytest.raises(ZygoteError, match="no zygote can be asked"):
        fork_from(zygote.path, "zygote_worker:give", 1)


def test_importing_the_package_is_cheap() -> None:
    code = "import sys, sllm_mini.cluster, sllm_mini.cluster.zygote, sllm_mini.cluster.snapshot; print([m for m in ('torch', 'numpy', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


# Snapshots


SAVED = """
import os, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})  # in every thread that torch will start, too
from pathlib import Path
import torch
from sllm_mini.loading import load_model
model, out = load_model(sys.argv[1]), Path(sys.argv[2])
for number in range(10):
    with torch.no_grad():
        total = model(torch.tensor([[1, 2, 3, 4]])).logits.double().sum().item()
    out.with_suffix(".new").write_text(f"{number} {os.getpid()} {total!r}")
    os.replace(out.with_suffix(".new"), out)
    signal.sigwait({signal.SIGUSR1})
"""


def answer(out: Path, number: int) -> list[str]:
    deadline = time.monotonic() + PATIENCE
    while not out.exists() or not out.read_text().startswith(f"{number} "):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return out.read_text().split()[1:]


def test_a_loaded_model_comes_back_from_its_snapshot(tiny: Checkpoint, tmp_path: Path) -> None:
    if reason := why_no_criu():
        pytest.skip(reason)
    out, folder = tmp_path / "out", tmp_path / "snapshot"
    command = [sys.executable, "-c", SAVED, str(tiny.path), str(out)]
    nowhere = subprocess.DEVNULL
    with subprocess.Popen(command, stdin=nowhere, stdout=nowhere, stderr=nowhere, start_new_session=True) as process:
        before = answer(out, 0)
        kept = save_snapshot(process.pid, tmp_path / "kept", keep_running=True)
        assert process.poll() is None and kept.pid == process.pid
        saved = save_snapshot(process.pid, folder)
        assert process.wait(PATIENCE) == -signal.SIGKILL
    assert saved.nbytes > tiny.nbytes
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    with pytest.raises(SnapshotError, match="is there already"):
        save_snapshot(os.getpid(), folder)
    libc = ctypes.CDLL(None)
    assert libc.prctl(PR_SET_CHILD_SUBREAPER, 1) == 0  # the orphan comes to this process, which collects it at once
    try:
        for _ in range(2):  # more than once, one after another
            assert restore_snapshot(folder) == saved.pid
            try:
                os.kill(saved.pid, signal.SIGUSR1)
                assert answer(out, 1) == before
                with pytest.raises(SnapshotError, match="was not restored: Can't fork for"):
                    restore_snapshot(folder)
            finally:
                os.kill(saved.pid, signal.SIGKILL)
                assert os.waitpid(saved.pid, 0) == (saved.pid, signal.SIGKILL)
            out.unlink()
    finally:
        libc.prctl(PR_SET_CHILD_SUBREAPER, 0)


def test_without_criu_the_reason_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert why_no_criu() == "criu is not installed; Debian and Ubuntu have a package of that name"
    with pytest.raises(UnsupportedError, match="no snapshot: criu is not installed"):
        save_snapshot(os.getpid(), tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def criu_that(does: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A shell script in the place of CRIU, and the folder it is in."""
    program = folder / "bin" / "criu"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\n{does}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    return program.parent


CHECK_FAILS = """
echo 'Error (criu/util.c:642): exited, status=1' >&2
echo 'Error (criu/vdso.c:381): vdso: Unexpected rt vDSO area bounds' >&2
exit 1
"""
DUMP_FAILS = """
[ "$1" = check ] && exit 0
echo '(00.01) Error (criu/util.c:1534): rlimit: cannot set it up' > "$3/criu.log"
echo '(00.02) Error (criu/files.c:7): unix: external socket is used' >> "$3/criu.log"
echo '(00.03) Error (criu/dump.c:9): Dumping FAILED.' >> "$3/criu.log"
exit 1
"""


@pytest.mark.parametrize(
    ("script", "error", "reason"),
    [
        (CHECK_FAILS, UnsupportedError, r"criu is installed but cannot work here \(vdso: Unexpected rt vDSO area bounds\)"),
        (DUMP_FAILS, SnapshotError, r"process \d+ was not saved: unix: external socket is used$"),
        ('[ "$1" = check ]', SnapshotError, "was not saved: it gave no reason"),
    ],
)
def test_what_criu_refuses_leaves_nothing_behind(script: str, error: type[Exception], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = criu_that(script, tmp_path, monkeypatch)
    with pytest.raises(error, match=reason):
        save_snapshot(os.getpid(), tmp_path / "new")
    assert list(tmp_path.iterdir()) == [program]


def test_all_that_can_fail_is_done_before_the_process_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    criu_that('[ "$1" = check ] || cat "$3/pid" > "$3/seen"', tmp_path, monkeypatch)
    saved = save_snapshot(4321, tmp_path / "new")
    assert saved.pid == 4321 and (saved.folder / "seen").read_text() == "4321"
    with pytest.raises(SnapshotError, match=r"gone/new cannot be made \(No such file or directory\); choose a folder in one that is there"):
        save_snapshot(4321, tmp_path / "gone" / "new")


def test_a_folder_without_a_snapshot_is_refused(tmp_path: Path) -> None:
    for content in (None, "", "many"):
        if content is not None:
            (tmp_path / "pid").write_text(content)
        with pytest.raises(SnapshotError, match="holds no snapshot"):
            open_snapshot(tmp_path)
    with pytest.raises(SnapshotError, match="save one there first"):
        restore_snapshot(tmp_path / "gone")
