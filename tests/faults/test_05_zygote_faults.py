"""Whichever process dies, and whatever comes over the socket: nobody hangs, nothing is left, and the error says what happened."""

from __future__ import annotations

import errno
import gc
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from processes import PATIENCE, children_of, is_gone, on_the_path

from sllm_mini.cluster import Child, ForkOptions, Zygote, ZygoteError, fork_from
from sllm_mini.cluster import zygote_process as process_module
from sllm_mini.cluster.zygote import ZygoteGoneError
from sllm_mini.cluster.zygote_messages import Begin, Exited, Failed, Fork, Forked, Signal
from sllm_mini.errors import WireError
from sllm_mini.wire import Channel, Message, WireTimeout, connect

WORKER = """
import os, resource, sys, time

def give(status=0):
    return status

def sleep():
    time.sleep(600)

def few_descriptors():
    resource.setrlimit(resource.RLIMIT_NOFILE, (64 + 5, 64 + 5))

def crash():
    os._exit(9)

def leave():
    sys.exit("enough")

def dawdle():
    time.sleep(600)

def escape():
    child = os.fork()
    if child == 0:
        time.sleep(600)
    os.setpgid(child, child)
    os.setpgid(0, child)  # out of the group that it leads
    time.sleep(600)

def stop():
    import signal
    os.kill(os.getpid(), signal.SIGSTOP)
"""
ENTRIES = [f"zygote_faults_worker:{name}" for name in ("give", "sleep", "escape", "stop")]
GIVE, SLEEP, ESCAPE, STOP = ENTRIES


@pytest.fixture(scope="module", autouse=True)
def search(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with on_the_path(tmp_path_factory.mktemp("worker"), "zygote_faults_worker", WORKER) as folder:
        yield folder


@pytest.fixture(scope="module")
def zygote(search: Path) -> Iterator[Zygote]:
    """One that serves all tests: what one of them does to it must not hurt the next."""
    with Zygote([], ENTRIES) as made:
        yield made


@pytest.fixture
def mortal(search: Path) -> Iterator[Zygote]:
    with Zygote([], ENTRIES) as made:
        yield made


@pytest.fixture(scope="module", autouse=True)
def own_folder() -> Iterator[None]:
    """Zygotes of others come and go in the machine's."""
    with tempfile.TemporaryDirectory(prefix="z") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", folder)
        patch.setenv("TMPDIR", folder)
        yield


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    gc.collect()
    before = len(os.listdir("/proc/self/fd")), folders()
    yield
    gc.collect()
    assert (len(os.listdir("/proc/self/fd")), folders()) == before


def folders() -> set[str]:
    """Sockets of zygotes that are no more."""
    return {str(place) for place in Path(tempfile.gettempdir()).glob("sllm-zygote-*") if not is_live(place)}


def is_live(place: Path) -> bool:
    try:
        connect(place / "socket", timeout=1).close()
    except WireError:
        return False
    return True


def is_serving(zygote: Zygote) -> bool:
    with zygote.fork(GIVE, 3) as child:
        return child.wait(PATIENCE) == 3


def is_well(zygote: Zygote) -> bool:
    """The zygote serves, and soon has no child left."""
    served = is_serving(zygote)
    deadline = time.monotonic() + PATIENCE
    while children_of(zygote.pid):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return served


def raw(zygote: Zygote) -> Channel[Message]:
    return Channel(connect(zygote.path), Forked | Failed | Exited, name="hostile client")


def forked(channel: Channel[Message]) -> Forked:
    """The answer to a fork, without the descriptor that came with it."""
    with channel.receive(PATIENCE) as received:
        assert isinstance(received.message, Forked) and len(received.fds) == 1
        return received.message


def request(entry: str) -> Fork:
    return Fork(entry, b"[[], {}]", dict(os.environb), b"/")


# kill -9


def test_a_child_that_is_killed_is_collected(zygote: Zygote) -> None:
    with zygote.fork(SLEEP) as child:
        os.kill(child.pid, signal.SIGKILL)
        assert child.wait(PATIENCE) == -signal.SIGKILL
    assert is_well(zygote)


def test_a_zygote_that_is_killed_takes_its_children_along(mortal: Zygote) -> None:
    children = [mortal.fork(SLEEP) for _ in range(3)]
    os.kill(mortal.pid, signal.SIGKILL)
    for child in children:
        with pytest.raises(ZygoteError, match=rf"child {child.pid} .* ended with its zygote, or was closed here; fork it from a new one"):
            child.wait(PATIENCE)
        assert is_gone(child.pid)
        child.signal(signal.SIGTERM)  # to nobody
        child.close()
    assert is_gone(mortal.pid)
    with pytest.raises(ZygoteError, match=r"no zygote can be asked for .*start it or check the path"):
        fork_from(mortal.path, GIVE)
    with pytest.raises(ZygoteError, match=r"ended with status -9, and its children with it; start a new one"):
        mortal.fork(GIVE)


def test_a_zygote_that_is_killed_while_it_forks_is_an_error_and_no_wait(mortal: Zygote) -> None:
    os.kill(mortal.pid, signal.SIGSTOP)  # the connection is taken by the kernel, and never answered
    failures: list[BaseException] = []

    def ask() -> None:
        try:
            fork_from(mortal.path, GIVE)
        except ZygoteError as error:
            failures.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    time.sleep(0.1)
    os.kill(mortal.pid, signal.SIGKILL)
    thread.join(PATIENCE)
    (failure,) = failures
    assert "it ended, or is stuck" in str(failure)


def test_a_child_of_a_zygote_that_hangs_can_be_killed_and_is_known_to_have_ended(mortal: Zygote) -> None:
    child = mortal.fork(SLEEP, options=ForkOptions(patience=0.3))
    assert not child.gone(0)
    os.kill(mortal.pid, signal.SIGSTOP)
    with pytest.raises(ZygoteGoneError, match="it ended, or is stuck"):
        mortal.fork(GIVE, options=ForkOptions(patience=0.3))
    child.kill()
    assert child.gone(PATIENCE)
    child.kill()
    with pytest.raises(WireTimeout):
        child.wait(0)  # nobody says how
    child.close()
    child.close()
    for ask in (child.kill, child.gone):
        with pytest.raises(ZygoteError, match="was closed here"):
            ask()
    mortal.kill()
    assert is_gone(mortal.pid)


def test_a_zygote_has_the_patience_it_was_given(search: Path) -> None:
    with Zygote([], ENTRIES, patience=0.3) as zygote:
        os.kill(zygote.pid, signal.SIGSTOP)
        with pytest.raises(ZygoteGoneError):
            zygote.fork(GIVE)
    assert is_gone(zygote.pid)


OWNER = """
import os, sys
sys.path.insert(0, sys.argv[1])
from sllm_mini.cluster import Zygote
zygote = Zygote([], ["zygote_faults_worker:sleep"])
child = zygote.fork("zygote_faults_worker:sleep")
print(zygote.pid, child.pid, zygote.path, flush=True)
sys.stdin.read()
"""
CLIENT = """
import sys
from sllm_mini.cluster import fork_from
child = fork_from(sys.argv[1], "zygote_faults_worker:sleep")
print(child.pid, flush=True)
sys.stdin.read()
"""


def started(code: str, argument: object) -> tuple[subprocess.Popen[str], list[str]]:
    process = subprocess.Popen([sys.executable, "-c", code, str(argument)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, process.stdout.readline().split()


def test_an_owner_that_is_killed_leaves_neither_zygote_nor_child_nor_file(search: Path) -> None:
    process, (zygote, child, path) = started(OWNER, search)
    with process:
        process.kill()
    assert is_gone(int(child)) and is_gone(int(zygote))
    assert not os.path.exists(os.path.dirname(path))


def test_an_owner_that_is_killed_during_the_imports_leaves_nothing_and_nothing_is_printed(tmp_path: Path) -> None:
    slow = "import os, pathlib, time\nhere = pathlib.Path(__file__).parent\n(here / 'pid').write_text(str(os.getpid()))\nwhile not (here / 'go').exists(): time.sleep(0.01)"
    (tmp_path / "slow_to_import.py").write_text(slow)
    owner = "import sys\nfrom sllm_mini.cluster import Zygote\nsys.path.append(sys.argv[1])\nZygote(['slow_to_import'])"
    with subprocess.Popen([sys.executable, "-c", owner, str(tmp_path)], stderr=subprocess.PIPE, env={**os.environ, "TMPDIR": str(tmp_path)}) as process:
        deadline = time.monotonic() + PATIENCE
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.kill()
        process.wait()
        (tmp_path / "go").touch()
        assert is_gone(int((tmp_path / "pid").read_text()))
        assert process.stderr is not None and process.stderr.read() == b""
    assert not list(tmp_path.glob("sllm-zygote-*"))


def test_an_owner_that_just_ends_leaves_nothing_either(search: Path) -> None:
    process, (zygote, child, path) = started(OWNER, search)
    process.communicate()
    assert is_gone(int(child)) and is_gone(int(zygote))
    assert not os.path.exists(os.path.dirname(path))


def test_a_client_that_is_killed_ends_its_child_and_no_other(zygote: Zygote) -> None:
    with zygote.fork(SLEEP) as other:
        process, (child,) = started(CLIENT, zygote.path)
        with process:
            process.kill()
        assert is_gone(int(child))
        assert other.poll() is None
    assert is_well(zygote)


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_child_that_nobody_holds_any_more_ends(zygote: Zygote) -> None:
    child: Child | None = zygote.fork(SLEEP)
    assert child is not None
    pid = child.pid
    child = None
    gc.collect()
    assert is_gone(pid)
    assert is_well(zygote)


def test_a_child_that_left_its_group_ends_too(mortal: Zygote) -> None:
    with mortal.fork(ESCAPE) as child:
        deadline = time.monotonic() + PATIENCE
        while os.getpgid(child.pid) == child.pid and time.monotonic() < deadline:
            time.sleep(0.01)
        group = os.getpgid(child.pid)
        assert group != child.pid
        mortal.close()
    assert is_gone(child.pid)
    os.killpg(group, signal.SIGKILL)  # what it started itself is its own affair


def test_a_signal_reaches_a_child_that_left_its_group(zygote: Zygote) -> None:
    with zygote.fork(ESCAPE) as child:
        deadline = time.monotonic() + PATIENCE
        while os.getpgid(child.pid) == child.pid and time.monotonic() < deadline:
            time.sleep(0.01)
        others = os.getpgid(child.pid)
        child.signal(signal.SIGTERM)
        assert child.wait(PATIENCE) == -signal.SIGTERM
    os.kill(others, signal.SIGKILL)  # what a child started elsewhere is its own to end
    assert is_well(zygote)


def test_a_child_that_stops_is_not_taken_for_one_that_ended(zygote: Zygote) -> None:
    with zygote.fork(STOP) as child:
        deadline = time.monotonic() + PATIENCE
        while " T " not in Path(f"/proc/{child.pid}/stat").read_text() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert child.poll() is None
        assert is_serving(zygote)
        child.signal(signal.SIGCONT)
        assert child.wait(PATIENCE) == 0


# The socket's path


def test_a_stale_socket_is_replaced_and_a_live_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with Zygote([], ENTRIES, path=path) as first:
        with pytest.raises(ZygoteError, match="a server listens there already; stop it or use another path"):
            Zygote([], ENTRIES, path=path)
        assert is_well(first)
        os.kill(first.pid, signal.SIGKILL)
        assert is_gone(first.pid)
        assert path.exists()
        with Zygote([], ENTRIES, path=path) as second:
            assert is_well(second)
    assert not path.exists()
    path.write_text("somebody's file")
    with pytest.raises(ZygoteError, match="is no socket; choose another path"):
        Zygote([], ENTRIES, path=path)
    assert path.read_text() == "somebody's file"
    with pytest.raises(ZygoteError, match="bytes that a socket's path may have"):
        Zygote([], ENTRIES, path=tmp_path / ("x" * 200))


# A start that fails


@pytest.mark.parametrize(
    ("imports", "entries", "reason"),
    [
        (["no_such_module"], [], r"no zygote: no_such_module cannot be imported or run: ModuleNotFoundError: No module named"),
        (["zygote_faults_worker:nothing"], [], r"AttributeError"),
        ([], ["zygote_faults_worker:nothing"], r"zygote_faults_worker:nothing cannot be imported or run: AttributeError"),
        ([], ["zygote_faults_worker"], r"an entry point is named module:function"),
        ([], ["zygote_faults_worker:__doc__"], r"an entry point must be callable"),
        (["zygote_faults_worker:leave"], [], r"no zygote: enough"),
        (["zygote_faults_worker:crash"], [], r"the zygote ended with status 9 during its imports; its standard error says why"),
    ],
)
def test_a_zygote_that_cannot_start_says_why(imports: list[str], entries: list[str], reason: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZygoteError, match=reason):
        Zygote(imports, entries)


def test_an_import_that_takes_for_ever_is_ended() -> None:
    with pytest.raises(ZygoteError, match=r"the zygote was not ready in 0\.5 seconds; give it more, or fewer imports"):
        Zygote(["zygote_faults_worker:dawdle"], timeout=0.5)


def test_a_process_out_of_descriptors_starts_none_and_leaves_no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(socket, "socketpair", refuse)
    with pytest.raises(OSError, match="Too many open files"):
        Zygote([])


def test_a_name_that_is_no_name_is_refused_before_anything_starts() -> None:
    with pytest.raises(WireError, match="Begin breaks its own schema"):
        Zygote([""])


# A request that fails


def test_arguments_that_are_not_json_never_leave_this_process(zygote: Zygote) -> None:
    for argument in (object(), {1j: 2}, float):
        with pytest.raises(ValueError, match="the arguments of a child travel as JSON"):
            zygote.fork(GIVE, argument)
    with pytest.raises(WireError, match="and the channel takes 1,048,576"):
        zygote.fork(GIVE, "x" * (1 << 20))
    assert is_well(zygote)


def test_a_folder_that_is_not_there_ends_the_child_and_says_so(zygote: Zygote, tmp_path: Path) -> None:
    with open(tmp_path / "err", "w+") as err:
        with zygote.fork(GIVE, options=ForkOptions(stderr=err, folder=tmp_path / "gone")) as child:
            assert child.wait(PATIENCE) == 1
        err.seek(0)
        assert "FileNotFoundError" in (said := err.read()) and "gone" in said


def test_closed_descriptors_are_refused(zygote: Zygote, tmp_path: Path) -> None:
    with pytest.raises(WireError, match="Bad file descriptor"):
        zygote.fork(GIVE, options=ForkOptions(stdout=900))
    with open(os.devnull) as null:
        pass
    with pytest.raises(ValueError, match="closed file"):
        zygote.fork(GIVE, options=ForkOptions(stdin=null))
    assert is_well(zygote)


def test_a_process_without_standard_streams_forks(zygote: Zygote, monkeypatch: pytest.MonkeyPatch) -> None:
    with open(os.devnull, "w") as closed:
        pass
    monkeypatch.setattr(sys, "stdout", closed)
    monkeypatch.setattr(sys, "stderr", None)  # as pythonw and some daemons have it
    with zygote.fork(GIVE, 3) as child:
        assert child.wait(PATIENCE) == 3


def test_a_child_whose_reader_is_gone_still_ends(zygote: Zygote) -> None:
    read, write = os.pipe()
    with zygote.fork(GIVE, "a reason to print", options=ForkOptions(stdout=write, stderr=write)) as child:
        os.close(write)
        os.close(read)
        assert child.wait(PATIENCE) in (0, 1)
    assert is_well(zygote)


# Hostile and unlucky clients


HEADER = struct.Struct("<3sBIIQ")


def frame(message: Message, *, fds: int = 0) -> bytes:
    body = msgspec.msgpack.encode(message)
    return HEADER.pack(b"SLM", 1, fds, len(body), 0) + body


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x00" * 64,
        HEADER.pack(b"SLM", 1, 0, (1 << 32) - 1, 0),
        HEADER.pack(b"SLM", 1, 3, 4, 0) + b"\x81\xa4type",
        HEADER.pack(b"SLM", 2, 0, 0, 0),
        HEADER.pack(b"SLM", 1, 0, 5, 1 << 40) + b"hello",
        frame(Begin(["os"], ["os:system"], "/tmp/x", True)),
        frame(Exited(0)),
        frame(request(GIVE))[:-10],
        frame(request(GIVE))[:30],
        b"S",
    ],
    ids=["http", "zeros", "huge", "lost descriptors", "version", "payload", "begin", "exited", "cut short", "header", "byte"],
)
def test_nonsense_ends_its_own_connection_alone(zygote: Zygote, sent: bytes) -> None:
    with zygote.fork(SLEEP) as other:
        with connect(zygote.path) as sock:
            sock.settimeout(PATIENCE)
            sock.sendall(sent)
            try:
                assert sock.recv(1) == b""  # after a second at most, though this end stays open
            except ConnectionResetError:
                pass  # it left some of the nonsense unread
        assert other.poll() is None
    assert is_well(zygote)


def test_a_request_without_its_descriptors_is_refused(zygote: Zygote) -> None:
    with raw(zygote) as channel:
        channel.send(request(GIVE))
        assert channel.receive(PATIENCE).message == Failed("a child needs its standard input, output and error")
    assert is_well(zygote)


def test_signals_without_a_child_reach_nobody(zygote: Zygote) -> None:
    with raw(zygote) as channel:
        channel.send(Signal(signal.SIGKILL))
        channel.send(request(GIVE), fds=[0, 1, 2])
        forked(channel)
        assert channel.receive(PATIENCE).message == Exited(0)
    with pytest.raises(WireError, match="breaks its own schema"), raw(zygote) as channel:
        channel.send(Signal(0))
    assert is_well(zygote)


def test_a_second_request_on_one_connection_ends_it_and_its_child(zygote: Zygote) -> None:
    with raw(zygote) as channel:
        channel.send(request(SLEEP), fds=[0, 1, 2])
        answer = forked(channel)
        channel.send(request(SLEEP), fds=[0, 1, 2])
        assert is_gone(answer.pid)
    assert is_well(zygote)


def test_clients_that_leave_at_once_harm_nobody(zygote: Zygote) -> None:
    for _ in range(50):
        connect(zygote.path).close()
    for _ in range(10):
        with raw(zygote) as channel:
            channel.send(request(SLEEP), fds=[0, 1, 2])
    assert is_well(zygote)


def test_a_connection_that_takes_over_the_number_of_another_is_not_taken_for_it(zygote: Zygote) -> None:
    """One client leaves and the next comes before the first one's child has been collected."""
    for _ in range(10):
        with raw(zygote) as leaving:
            leaving.send(request(SLEEP), fds=[0, 1, 2])
            forked(leaving)
            os.kill(zygote.pid, signal.SIGSTOP)
        with raw(zygote) as coming:
            coming.send(request(GIVE), fds=[0, 1, 2])
            os.kill(zygote.pid, signal.SIGCONT)
            forked(coming)
            assert coming.receive(PATIENCE).message == Exited(0)
    assert is_well(zygote)


def test_out_of_descriptors_a_zygote_lets_the_next_client_wait(search: Path) -> None:
    with Zygote(["zygote_faults_worker:few_descriptors"], ENTRIES) as zygote:
        children = [zygote.fork(SLEEP) for _ in range(3)]  # two descriptors each, and room for five
        late: list[int] = []

        def ask() -> None:
            with zygote.fork(GIVE, 5) as child:
                late.append(child.wait(PATIENCE))

        thread = threading.Thread(target=ask)
        thread.start()
        thread.join(0.3)
        assert thread.is_alive() and late == []
        for child in children:
            assert child.poll() is None
            child.close()
        thread.join(PATIENCE)
        assert late == [5]
        assert is_well(zygote)


def test_a_machine_that_cannot_fork_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_fork() -> int:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(process_module.os, "fork", no_fork)
    monkeypatch.setattr(process_module, "why_not_forkable", lambda: None)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        server = process_module._Zygote.__new__(process_module._Zygote)
        server._entries = {GIVE: print}
        received = process_module.Received(request(GIVE), None, (0, 1, 2))
        lease = process_module._Lease(Channel(theirs, Fork | Signal, name="client"), theirs.fileno())
        assert server._fork(lease, received) == Failed("this machine has no room for another process: Resource temporarily unavailable")
