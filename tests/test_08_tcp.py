"""Channels over TCP: nobody gets through who does not know the key, nobody holds up others, and what is served at an address is served there too."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from fake_engine import FakeEngine, whole_text
from hypothesis import given
from hypothesis import strategies as st
from store_process import eventually

from sllm_mini.errors import StoreError, WireError
from sllm_mini.inference.ownership.ledger import TokenLedger
from sllm_mini.inference.ownership.register import EpochRegister
from sllm_mini.inference.ownership.server import OwnershipServer
from sllm_mini.inference.sampler import SamplingOptions
from sllm_mini.inference.session import Session
from sllm_mini.inference.workers.service import EngineService
from sllm_mini.storage.client import StoreClient
from sllm_mini.storage.server import StoreServer
from sllm_mini.storage.store import Store
from sllm_mini.wire import (
    Channel,
    ChannelClosed,
    Connections,
    Listener,
    Message,
    WireTimeout,
    connect,
    get_key,
    listen,
    set_key,
    tcp,
)

KEY = bytes(range(32))
OTHER = bytes(reversed(range(32)))
HELLO = len(tcp._CALL) + 32
WORDS = HELLO + 32
"""Bytes that each side says in a handshake."""
PATIENCE = 20.0
ANY = "tcp://127.0.0.1:0"


class Say(Message, frozen=True):
    number: int
    max_fds = 1


@pytest.fixture(autouse=True)
def a_key_of_the_process() -> Iterator[None]:
    set_key(KEY)
    yield
    set_key(None)


@pytest.fixture(autouse=True)
def no_descriptor_is_lost(a_key_of_the_process: None) -> Iterator[None]:
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.fixture(scope="module")
def door() -> Iterator[Listener]:
    """One listener for all the strangers."""
    with listen(ANY, key=KEY) as made:
        yield made


def say(sock: socket.socket, number: int) -> int:
    """Asks an echo, and returns what it answers."""
    with Channel(sock, Say, name="a caller") as channel:
        channel.send(Say(number))
        return channel.receive(PATIENCE).message.number


def echo(channel: Channel[Say]) -> None:
    while True:
        channel.send(Say(channel.receive().message.number + 1))


def dial(address: str) -> socket.socket:
    """A bare connection, with nothing said."""
    sock = socket.create_connection(tcp.split_address(address))
    sock.settimeout(PATIENCE)
    return sock


def read(sock: socket.socket, nbytes: int) -> bytes:
    """So many bytes, or as many as come before the end."""
    found = b""
    with suppress(ConnectionResetError):
        while len(found) < nbytes and (some := sock.recv(nbytes - len(found))):
            found += some
    return found


def call(listener: Listener, speak: Callable[[socket.socket], None]) -> socket.socket | None:
    """Who gets through when a caller does `speak`, on another thread, and goes."""

    def caller() -> None:
        with dial(listener.address) as sock, suppress(OSError):
            speak(sock)

    thread = threading.Thread(target=caller)
    thread.start()
    try:
        while True:
            with suppress(WireTimeout):
                return listener.accept(0.005)
            if not thread.is_alive():
                with suppress(WireTimeout):
                    return listener.accept(0)
                return None
    finally:
        thread.join()


def speak_as_caller(change: Callable[[bytes], bytes], key: bytes = KEY, said: list[bytes] | None = None) -> Callable[[socket.socket], None]:
    """An honest caller's words, except for what `change` makes of all of them."""

    def speak(sock: socket.socket) -> None:
        nonce = os.urandom(32)
        hello = tcp._CALL + nonce
        # The change is of the whole, so the proof must be known before the hello goes: a place for it stands in until then.
        first = change(hello + bytes(32))[:HELLO]
        sock.sendall(first)
        theirs = read(sock, HELLO)[len(tcp._HEAR) :] if len(first) == HELLO else b""
        whole = hello + tcp._proof(key, b"caller", nonce, theirs)
        if said is not None:
            said.append(whole)
        sock.sendall(change(whole)[HELLO:])
        sock.shutdown(socket.SHUT_WR)
        read(sock, 32)

    return speak


@contextmanager
def a_false_listener(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """Takes one call and answers it as it likes."""
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as pool:

        def serve() -> None:
            sock, _ = server.accept()
            with sock, suppress(OSError):
                sock.settimeout(PATIENCE)
                answer(sock)

        done = pool.submit(serve)
        yield tcp.join_address(*server.getsockname())
        done.result()


def answer_as_listener(change: Callable[[bytes], bytes], key: bytes = KEY) -> Callable[[socket.socket], None]:
    """An honest listener's words to an honest caller, except for what `change` makes of them."""

    def answer(sock: socket.socket) -> None:
        theirs, ours = read(sock, HELLO)[len(tcp._CALL) :], os.urandom(32)
        whole = change(tcp._HEAR + ours + tcp._proof(key, b"listener", theirs, ours))
        sock.sendall(whole[:HELLO])
        if len(whole) > HELLO:
            read(sock, 32)
            sock.sendall(whole[HELLO:])

    return answer


# --- what comes through ---


@pytest.mark.parametrize("address", [ANY, "tcp://:0", "tcp://localhost:0", "tcp://[::1]:0"])
def test_frames_go_both_ways_between_those_who_know_the_key(address: str) -> None:
    if "::1" in address and not socket.has_ipv6:
        pytest.skip("this machine has no IPv6")
    with closing(Connections(address, Say, echo, name="echo")) as served:
        host, port = tcp.split_address(served.address)
        assert port > 0 and (host == "127.0.0.1" if address == "tcp://:0" else True)
        sock = connect(served.address, timeout=PATIENCE)
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) and sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert say(sock, 4) == 5


def test_a_process_without_a_key_neither_listens_nor_connects(monkeypatch: pytest.MonkeyPatch) -> None:
    set_key(None)
    for act in (lambda: listen(ANY), lambda: connect("tcp://127.0.0.1:1"), get_key):
        with pytest.raises(WireError, match="this process has none; give both the same one"):
            act()
    with closing(Connections(ANY, Say, echo, name="echo", key=OTHER)) as served:
        assert say(connect(served.address, key=OTHER, timeout=PATIENCE), 1) == 2
    with pytest.raises(ValueError, match="can be guessed"):
        set_key(b"secret")


def test_another_key_is_one_sentence_at_both_ends_and_the_listener_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    with closing(Connections(ANY, Say, echo, name="echo")) as served:
        with caplog.at_level(logging.WARNING):
            with pytest.raises(WireError, match="the server knows another key, and was sent nothing"):
                connect(served.address, key=OTHER, timeout=PATIENCE)
            assert say(connect(served.address, timeout=PATIENCE), 1) == 2  # who listens has told of the one before by then
        assert [record.getMessage() for record in caplog.records] == [f"{served.address}: a caller from 127.0.0.1 was refused: it knows another key; give both ends the same one"]


def test_callers_that_are_refused_fill_no_log(caplog: pytest.LogCaptureFixture) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as listening, closing(tcp.Callers(listening, "here", KEY)) as callers, caplog.at_level(logging.WARNING):
        for number in range(6):
            if number == 5:
                callers._quiet_until = 0.0  # so much later
            with closing(socket.create_connection(listening.getsockname())) as client:
                callers.add(listening.accept()[0])
                client.sendall(b"x" * HELLO)
                callers.wait(None)
                assert callers.proven() is None
    said = "here: a caller from 127.0.0.1 was refused: it speaks another protocol"
    assert [record.getMessage() for record in caplog.records] == [said, f"{said} (and 4 others since the last one that was named)"]


def test_what_a_caller_says_before_it_is_heard_is_the_first_frame(door: Listener) -> None:
    """Nothing past the handshake is read by it."""

    def speak(sock: socket.socket) -> None:
        tcp._prove(sock, KEY, "door", time.monotonic() + PATIENCE)
        with Channel(sock, Say, name="caller") as channel:
            channel.send(Say(7))

    sock = call(door, speak)
    assert sock is not None
    with Channel(sock, Say, name="door") as channel:
        assert channel.receive(PATIENCE).message == Say(7)


@given(st.one_of(st.ip_addresses().map(str), st.from_regex(r"\A[a-z][a-z0-9.-]{0,20}\Z")), st.integers(0, 65535))
def test_an_address_comes_back_as_it_went(host: str, port: int) -> None:
    assert tcp.split_address(tcp.join_address(host, port)) == (host, port)


@pytest.mark.parametrize("address", ["tcp://host", "tcp://host:", "tcp://host:65536", "tcp://host:-1", "tcp://host:٣", "tcp://::1:5", "tcp://me@host:5", "tcp://host/x:5", "tcp://a b:5"])
def test_what_is_no_address_is_refused(address: str) -> None:
    for act in (listen, connect):
        with pytest.raises(WireError, match=r"write tcp://host:port"):
            act(address)


def test_nobody_there_and_a_taken_port_are_errors_that_say_so() -> None:
    with listen(ANY) as listener:
        with pytest.raises(WireError, match="nothing can listen there"):
            listen(listener.address)
        with pytest.raises(WireTimeout, match="in time"):  # it is there, but does not accept
            connect(listener.address, timeout=0.05)
    with pytest.raises(WireError, match="no server answers there"):
        connect(listener.address, timeout=PATIENCE)
    with pytest.raises(WireError, match="nothing can listen there"):
        listen("tcp://192.0.2.1:0")  # an address of no machine (RFC 5737)


# --- who does not ---


def test_an_honest_caller_gets_through_the_helpers_of_this_module(door: Listener) -> None:
    sock = call(door, speak_as_caller(lambda words: words))
    assert sock is not None
    sock.close()
    with a_false_listener(answer_as_listener(lambda words: words)) as address:
        connect(address, timeout=PATIENCE).close()


@given(st.integers(0, WORDS * 8 - 1))
def test_no_flipped_bit_gets_a_caller_through(door: Listener, bit: int) -> None:
    assert call(door, speak_as_caller(lambda words: flipped(words, bit))) is None


@given(st.integers(0, WORDS * 8 - 1))
def test_no_flipped_bit_gets_a_listener_believed(bit: int) -> None:
    with a_false_listener(answer_as_listener(lambda words: flipped(words, bit))) as address, pytest.raises(WireError):
        connect(address, timeout=PATIENCE)


@given(st.integers(0, WORDS - 1))
def test_no_truncated_words_get_anybody_through(door: Listener, cut: int) -> None:
    assert call(door, speak_as_caller(lambda words: words[:cut])) is None
    with a_false_listener(answer_as_listener(lambda words: words[:cut])) as address, pytest.raises(WireError):
        connect(address, timeout=PATIENCE)


@given(st.binary(max_size=2 * WORDS))
def test_no_other_words_get_anybody_through(door: Listener, words: bytes) -> None:
    assert call(door, lambda sock: sock.sendall(words)) is None
    with a_false_listener(lambda sock: sock.sendall(words)) as address, pytest.raises(WireError):
        connect(address, timeout=PATIENCE)


def flipped(words: bytes, bit: int) -> bytes:
    changed = bytearray(words)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def test_words_that_were_recorded_prove_nothing_again(door: Listener) -> None:
    said: list[bytes] = []
    sock = call(door, speak_as_caller(lambda words: words, said=said))
    assert sock is not None
    sock.close()

    def again(sock: socket.socket) -> None:
        sock.sendall(said[0])
        read(sock, WORDS)

    assert call(door, again) is None
    with listen(ANY) as listener, ThreadPoolExecutor(1) as pool:
        accepted = pool.submit(listener.accept, PATIENCE)
        with dial(listener.address) as raw:
            raw.sendall(tcp._CALL + bytes(32))
            hello = read(raw, HELLO)
            raw.sendall(tcp._proof(KEY, b"caller", bytes(32), hello[len(tcp._HEAR) :]))
            recorded = hello + read(raw, 32)
            accepted.result().close()

    def repeat(sock: socket.socket) -> None:
        sock.sendall(recorded)
        read(sock, HELLO + 32)

    with a_false_listener(repeat) as address, pytest.raises(WireError, match="another key"):
        connect(address, timeout=PATIENCE)


def test_words_that_are_sent_back_to_their_maker_prove_nothing(door: Listener) -> None:
    def mirror(sock: socket.socket) -> None:
        sock.sendall(tcp._HEAR + read(sock, HELLO)[len(tcp._CALL) :])
        sock.sendall(read(sock, 32))

    with a_false_listener(mirror) as address, pytest.raises(WireError, match="another key"):
        connect(address, timeout=PATIENCE)

    def mirrored(sock: socket.socket) -> None:
        sock.sendall(tcp._CALL + os.urandom(32))
        sock.sendall(read(sock, HELLO)[len(tcp._HEAR) :])  # the listener's nonce where its proof should be
        read(sock, 32)

    assert call(door, mirrored) is None


def test_a_caller_that_has_proved_nothing_is_told_nothing_that_proves(door: Listener) -> None:
    answers: list[bytes] = []

    def speak(sock: socket.socket) -> None:
        sock.sendall(tcp._CALL + bytes(64))
        answers.append(read(sock, 1000))

    assert call(door, speak) is None
    assert answers[0][HELLO:] == bytes(32)


# --- who says nothing ---


def test_silent_strangers_hold_up_nobody_and_are_sent_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp, "HANDSHAKE_SECONDS", 0.3)
    with closing(Connections(ANY, Say, echo, name="echo")) as served, dial(served.address) as silent, dial(served.address) as halfway:
        halfway.sendall(tcp._CALL)
        before = threading.active_count()
        assert say(connect(served.address, timeout=PATIENCE), 1) == 2
        assert read(silent, 1) == b"" and read(halfway, 1) == b"", "they were not sent away"
        eventually(lambda: threading.active_count() <= before)


def test_of_too_many_strangers_the_oldest_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp, "MAX_CALLERS", 4)
    with closing(Connections(ANY, Say, echo, name="echo")) as served:
        strangers = [dial(served.address) for _ in range(9)]
        assert say(connect(served.address, timeout=PATIENCE), 1) == 2
        gone = [sock for sock in strangers if is_over(sock)]
        assert strangers[:5] == gone[:5] and len(gone) <= 6
        for sock in strangers:
            sock.close()


def is_over(sock: socket.socket) -> bool:
    sock.settimeout(0.1)
    try:
        return not sock.recv(1)
    except TimeoutError:
        return False
    except ConnectionResetError:
        return True


def test_closing_wakes_accept_and_ends_those_in_their_handshake() -> None:
    with ThreadPoolExecutor(1) as pool:
        listener = listen(ANY)
        accepting: Future[Any] = pool.submit(listener.accept)
        with dial(listener.address) as stranger:
            stranger.sendall(tcp._CALL)
            time.sleep(0.05)
            listener.close()
            listener.close()
            with pytest.raises(ChannelClosed):
                accepting.result(PATIENCE)
            assert listener.fileno() == -1 and read(stranger, 1) == b""


# --- what is served at an address ---


def test_descriptors_do_not_pass_over_tcp_and_the_refusal_says_so(tmp_path: Path) -> None:
    with closing(Connections(ANY, Say, echo, name="echo")) as served, Channel(connect(served.address, timeout=PATIENCE), Say, name="us") as channel, open(os.devnull) as file:
        with pytest.raises(WireError, match="descriptors pass over Unix sockets only"):
            channel.send(Say(1), fds=[file.fileno()])
        channel.send(Say(1))
        assert channel.receive(PATIENCE).message == Say(2)


def test_a_store_answers_over_tcp_but_lends_no_memory_there(tmp_path: Path) -> None:
    import torch

    from sllm_mini.checkpoint import save_checkpoint

    save_checkpoint({"model.layers.0.w": torch.zeros(4)}, tmp_path / "m")
    with Store(tmp_path / "store", dram_nbytes=16 << 20) as store, StoreServer(store, ANY) as server:
        client = StoreClient(server.address)
        client.register("m", tmp_path / "m")
        client.prefetch("m")
        assert [model.name for model in client.models()] == ["m"]
        with pytest.raises((WireError, StoreError), match="descriptors pass over Unix sockets only"):
            client.attach("m", "cpu")


def test_a_request_is_served_told_and_moved_over_tcp_by_address_alone() -> None:
    """The register and the ledger, the tokens of an engine, and a move between two engines: nothing is given but addresses."""
    register = EpochRegister()
    ledger = TokenLedger(register)
    with OwnershipServer(register, ledger, ANY) as router:
        one, two = (EngineService(engine(), owner=name, address=ANY, arbiter=router.address, on_error=fail) for name in ("one", "two"))
        try:
            session = Session("story", "fake", (1, 2, 3), 3, 80, SamplingOptions(), (), stop_at_eos=False)
            ledger.open(session)
            epoch = register.claim("story", "one", 0)
            assert epoch is not None
            one.run(session, epoch)
            stream = ledger.stream("story", timeout=PATIENCE)
            pieces = [next(stream) for _ in range(5)]
            assert two.address.startswith("tcp://")
            report = one.move("story", two.address, mode="tokens")
            pieces += stream
            assert (report.outcome, report.owner) == ("moved", "two")
            assert (tuple(piece.token_id for piece in pieces), "".join(piece.text for piece in pieces), ledger.finish("story")) == whole_text(session)
            assert {piece.epoch for piece in pieces} == {1, 2}
        finally:
            one.close()
            two.close()


def fail(error: BaseException) -> None:
    pytest.fail(str(error))


def engine() -> Any:
    return FakeEngine(step_seconds=0.005)
