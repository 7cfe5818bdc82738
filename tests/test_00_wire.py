"""The wire: frames, schemas and descriptors, against honest peers, hostile ones and broken ones."""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import functools
import os
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sllm_mini.errors import WireError
from sllm_mini.wire import MAX_FDS, Channel, ChannelClosed, Message, WireTimeout, connect, listen, peer
from sllm_mini.wire import listener as listener_module
from sllm_mini.wire.message import decoder

U63 = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
HEADER = struct.Struct("<3sBIIQ")
PATIENCE = 20.0
"""Seconds after which a thing that should happen at once counts as never; no test measures with it."""


class Extent(Message, frozen=True):
    name: str
    nbytes: U63
    max_fds = 2


class Wide(Message, frozen=True):
    max_fds = MAX_FDS


class Block(Message, frozen=True):
    layer: U63
    scale: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.5
    parts: list[Extent] = msgspec.field(default_factory=list)


def fd_count() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture(autouse=True)
def no_descriptor_is_lost() -> Iterator[None]:
    before = fd_count()
    yield
    assert fd_count() == before


def channel(sock: socket.socket, name: str, **options: Any) -> Channel[Extent | Wide | Block]:
    return Channel(sock, Extent | Wide | Block, name=name, **options)


@contextlib.contextmanager
def pair(**options: Any) -> Iterator[tuple[Channel[Any], Channel[Any]]]:
    left, right = socket.socketpair()
    with channel(left, "left", **options) as a, channel(right, "right", **options) as b:
        yield a, b


@contextlib.contextmanager
def victim(**options: Any) -> Iterator[tuple[socket.socket, Channel[Any]]]:
    """A raw socket in the hands of a hostile peer, and the channel it talks to."""
    raw, right = socket.socketpair()
    with raw, channel(right, "victim", **options) as target:
        yield raw, target


def frame(message: Message | bytes, *, fds: int = 0, payload: bytes = b"", magic: bytes = b"SLM", version: int = 1, nbytes: int | None = None) -> bytes:
    body = message if isinstance(message, bytes) else msgspec.msgpack.encode(message)
    return HEADER.pack(magic, version, fds, len(body) if nbytes is None else nbytes, len(payload)) + body + payload


def in_thread(work: Callable[[], object]) -> tuple[threading.Thread, list[object]]:
    """Runs `work` beside the test; its result, or what it raised, ends up in the list."""
    results: list[object] = []

    def run() -> None:
        try:
            results.append(work())
        except WireError as error:
            results.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, results


# What goes in comes out


messages = st.one_of(
    st.builds(Extent, name=st.text(max_size=40), nbytes=st.integers(0, (1 << 63) - 1)),
    st.builds(
        Block,
        layer=st.integers(0, (1 << 63) - 1),
        scale=st.floats(0, 1),
        parts=st.lists(st.builds(Extent, name=st.text(max_size=5), nbytes=st.integers(0, 9)), max_size=4),
    ),
)


@given(st.lists(st.tuples(messages, st.lists(st.binary(max_size=300), max_size=4)), min_size=1, max_size=6))
def test_every_message_and_payload_comes_back_as_it_went(frames: list[tuple[Message, list[bytes]]]) -> None:
    with pair() as (a, b):
        for message, parts in frames:
            a.send(message, payload=parts)
        for message, parts in frames:
            got = b.receive(PATIENCE, into=lambda _, nbytes: bytearray(nbytes))
            assert got.message == message
            assert bytes(got.payload or b"") == b"".join(parts)


def test_a_payload_lands_in_the_memory_that_was_given_and_costs_no_other() -> None:
    nbytes = 24 << 20
    source = os.urandom(1 << 20) * 24
    target = bytearray(nbytes)
    asked: list[tuple[Any, int]] = []

    def place(message: Any, size: int) -> memoryview:
        asked.append((message, size))
        return memoryview(target)

    with pair() as (a, b):
        # More parts than one sendmsg takes, of unlike sizes, one of them empty and one not of bytes.
        floats = memoryview(source)[: 1 << 20].cast("d")
        parts: list[Any] = [floats, b"", *(memoryview(source)[i : i + 8192] for i in range(1 << 20, nbytes, 8192))]
        thread, _ = in_thread(lambda: a.send(Block(layer=3), payload=parts))
        got = b.receive(PATIENCE, into=place)
        thread.join(PATIENCE)
        assert asked == [(Block(layer=3), nbytes)]
        assert got.payload is not None and got.payload.obj is target
        assert target == source


def test_descriptors_arrive_in_order_usable_and_closed_on_exec() -> None:
    with pair() as (a, b):
        fds = [os.memfd_create(f"part{i}") for i in range(2)]
        for i, fd in enumerate(fds):
            os.write(fd, b"%d" % i)
        a.send(Extent("weights", 2), fds=fds)
        for fd in fds:
            os.close(fd)
        with b.receive(PATIENCE) as got:
            assert [os.pread(fd, 8, 0) for fd in got.fds] == [b"0", b"1"]
            assert not any(os.get_inheritable(fd) for fd in got.fds)


def test_descriptors_go_once_even_when_a_frame_leaves_in_many_pieces() -> None:
    with pair() as (a, b), open(os.devnull, "rb") as null:
        thread, _ = in_thread(lambda: a.send(Extent("x", 1), payload=bytes(4 << 20), fds=[null.fileno()]))
        with b.receive(PATIENCE, into=lambda _, n: bytearray(n)) as got:
            assert len(got.fds) == 1
        thread.join(PATIENCE)


def test_as_many_descriptors_as_linux_takes() -> None:
    with pair() as (a, b), open(os.devnull, "rb") as null:
        a.send(Wide(), fds=[null.fileno()] * MAX_FDS)
        with b.receive(PATIENCE) as got:
            assert len(set(got.fds)) == MAX_FDS


@pytest.mark.parametrize("step", [1, 2, 3, 7, 19, 20, 21, 30])
def test_a_frame_may_come_in_pieces_with_its_descriptors_on_the_first(step: int) -> None:
    data = frame(Extent("slow", 5), fds=1, payload=b"payload bytes")
    with victim() as (raw, target), open(os.devnull, "rb") as null:
        thread, results = in_thread(lambda: target.receive(PATIENCE, into=lambda _, n: bytearray(n)))
        socket.send_fds(raw, [data[:step]], [null.fileno()])
        for at in range(step, len(data), step):
            time.sleep(0.001)
            raw.sendall(data[at : at + step])
        thread.join(PATIENCE)
        (got,) = results
        assert got.message == Extent("slow", 5) and got.payload == b"payload bytes" and len(got.fds) == 1  # type: ignore[attr-defined]
        got.close()  # type: ignore[attr-defined]


def test_descriptors_of_the_next_frame_stay_with_it() -> None:
    with victim() as (raw, target), open(os.devnull, "rb") as null:
        raw.sendall(frame(Block(1)))
        socket.send_fds(raw, [frame(Extent("mine", 1), fds=1)], [null.fileno()])
        raw.sendall(frame(Block(2)))
        assert target.receive(PATIENCE).fds == ()
        with target.receive(PATIENCE) as got:
            assert len(got.fds) == 1
        assert target.receive(PATIENCE).message == Block(2)


def test_works_over_tcp_but_passes_no_descriptors_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        accepted, _ = server.accept()
    with channel(client, "client") as a, channel(accepted, "server") as b:
        a.send(Block(7), payload=b"abc")
        got = b.receive(PATIENCE, into=lambda _, n: bytearray(n))
        assert (got.message, bytes(got.payload or b"")) == (Block(7), b"abc")
        with pytest.raises(WireError, match="Unix sockets only"):
            a.send(Extent("x", 1), fds=[0])


# What a hostile or broken peer sends


@pytest.mark.parametrize("cut", range(len(frame(Extent("cut", 5), payload=b"12345"))))
def test_a_stream_that_ends_within_a_frame_is_truncated_and_at_its_start_a_clean_end(cut: int) -> None:
    data = frame(Extent("cut", 5), fds=1, payload=b"12345")
    with victim() as (raw, target), open(os.devnull, "rb") as null:
        if cut:
            socket.send_fds(raw, [data[:cut]], [null.fileno()])
        raw.close()
        with pytest.raises(WireError) as caught:
            target.receive(PATIENCE, into=lambda _, n: bytearray(n))
        assert isinstance(caught.value, ChannelClosed) == (cut == 0)
        assert "victim" in str(caught.value)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "starts no message"),
        (frame(Block(1), version=2), "version 2"),
        (frame(Block(1), nbytes=(1 << 20) + 1), "1,048,577 bytes was announced"),
        (frame(Block(1), nbytes=0xFFFFFFFF), "4,294,967,295 bytes was announced"),
        (frame(Block(1), fds=1), "declares 1 descriptors and 0 came"),
        (frame(b""), "schema"),
        (frame(b"\xc1"), "schema"),
        (frame(msgspec.msgpack.encode({"type": "Unlink", "path": "/"})), "Unlink"),
        (frame(msgspec.msgpack.encode({"layer": 1})), "type"),
        (frame(msgspec.msgpack.encode({"type": "Block", "layer": 1, "more": 2})), "more"),
        (frame(msgspec.msgpack.encode({"type": "Block", "layer": 1, "parts": [{"type": "Extent", "name": "a", "nbytes": 1, "more": 2}]})), "more"),
        (frame(msgspec.msgpack.encode({"type": "Block"})), "layer"),
        (frame(msgspec.msgpack.encode({"type": "Block", "layer": "1"})), "int"),
        (frame(msgspec.msgpack.encode({"type": "Block", "layer": -1})), ">= 0"),
        (frame(msgspec.msgpack.encode({"type": "Block", "layer": 1 << 63})), "int"),
        (frame(msgspec.msgpack.encode({"type": "Block", "layer": 1, "scale": float("nan")})), ">= 0"),
        (frame(msgspec.msgpack.encode({"type": "Block", "layer": 1, "scale": float("inf")})), "<= 1"),
        (frame(msgspec.msgpack.encode({"type": "Extent", "name": b"\xff", "nbytes": 1})), "str"),
        (frame(b"\x83\xa4type\xa6Extent\xa4name\xa1\xff\xa6nbytes\x01"), "utf-8"),
        (frame(b"\x83\xa4type\xa5Block\xa5layer\x01\xa5parts\xdd\xff\xff\xff\xff"), "truncated"),
        (frame(msgspec.msgpack.encode(Block(1)) + b"\0"), "trailing"),
        (frame(b"\x91" * 5000 + b"\x90"), "schema"),
        (frame(Block(1), payload=b"unasked"), "nobody asked for"),
        (b"\x80\x04\x95" + b"pickle" * 10, "starts no message"),
    ],
)
def test_a_bad_frame_is_one_error_and_the_end_of_the_channel(data: bytes, reason: str) -> None:
    with victim() as (raw, target):
        raw.sendall(data + frame(Block(9)))
        with pytest.raises(WireError, match="(?i)" + reason) as caught:
            target.receive(PATIENCE)
        assert "victim" in str(caught.value)
        for again in (lambda: target.receive(PATIENCE), lambda: target.send(Block(1))):
            with pytest.raises(ChannelClosed, match="earlier failure"):
                again()
        raw.settimeout(PATIENCE)
        with contextlib.suppress(ConnectionResetError):
            assert raw.recv(1) == b""  # and the peer notices


@given(st.data())
def test_no_mutation_of_a_stream_does_more_than_fail(data: st.DataObject) -> None:
    stream = bytearray(b"".join(frame(m, payload=b"kv" * i) for i, m in enumerate([Block(1), Extent("abc", 4), Block(2, 1.0, [Extent("x", 0)])])))
    for _ in range(data.draw(st.integers(1, 4))):
        stream[data.draw(st.integers(0, len(stream) - 1))] = data.draw(st.integers(0, 255))
    with victim(max_nbytes=4096) as (raw, target):
        raw.sendall(stream)
        raw.shutdown(socket.SHUT_WR)
        with pytest.raises(WireError):
            for _ in range(10):
                target.receive(PATIENCE, into=lambda _, n: bytearray(min(n, 4096))).close()


@pytest.mark.parametrize("position", [0, 1, 19])
def test_an_announced_size_costs_no_memory(position: int) -> None:
    """A header may claim exabytes of payload: `into` sees the number before anything is asked for."""
    seen: list[int] = []

    def refuse(message: object, nbytes: int) -> bytearray:
        seen.append(nbytes)
        raise WireError("too large for this receiver")

    with victim() as (raw, target):
        raw.sendall(HEADER.pack(b"SLM", 1, 0, len(msgspec.msgpack.encode(Block(1))), (1 << 64) - 1) + msgspec.msgpack.encode(Block(1)))
        with pytest.raises(WireError, match="too large for this receiver"):
            target.receive(PATIENCE, into=refuse)
        assert seen == [(1 << 64) - 1]


@pytest.mark.parametrize("wrong", [bytearray(2), bytearray(4), b"abc"])
def test_memory_of_another_size_or_read_only_is_refused(wrong: bytes) -> None:
    with pair() as (a, b):
        a.send(Block(1), payload=b"xyz")
        with pytest.raises(WireError, match="3 writable bytes"):
            b.receive(PATIENCE, into=lambda _, nbytes: wrong)


@pytest.mark.parametrize("declared", [0, 1, 3, 253, 4_000_000_000])
def test_descriptors_that_are_not_as_declared_are_closed(declared: int) -> None:
    with victim() as (raw, target), open(os.devnull, "rb") as null:
        socket.send_fds(raw, [frame(Extent("x", 1), fds=declared)], [null.fileno()] * 2)
        with pytest.raises(WireError, match=f"declares {declared} descriptors and 2 came"):
            target.receive(PATIENCE)


def test_descriptors_on_a_message_that_may_carry_none_are_closed() -> None:
    with victim() as (raw, target), open(os.devnull, "rb") as null:
        socket.send_fds(raw, [frame(Block(1), fds=1)], [null.fileno()])
        with pytest.raises(WireError, match="Block may carry 0 descriptors"):
            target.receive(PATIENCE)


@pytest.mark.parametrize("data", [b"GET /", frame(b"\xc1", fds=2), frame(Extent("x", 1), fds=2, payload=b"unasked")])
def test_descriptors_of_a_bad_frame_are_closed(data: bytes) -> None:
    with victim() as (raw, target), open(os.devnull, "rb") as null:
        socket.send_fds(raw, [data.ljust(40)], [null.fileno()] * 2)
        with pytest.raises(WireError):
            target.receive(PATIENCE)


def test_descriptors_of_a_frame_whose_receiver_raises_are_closed() -> None:
    def fail(message: object, nbytes: int) -> bytearray:
        raise KeyError("no such block")

    with pair() as (a, b), open(os.devnull, "rb") as null:
        a.send(Extent("x", 1), payload=b"abc", fds=[null.fileno()])
        with pytest.raises(KeyError):
            b.receive(PATIENCE, into=fail)
        with pytest.raises(ChannelClosed):
            b.receive(PATIENCE)


@pytest.mark.parametrize("at", [HEADER.size, HEADER.size + 3, -2])
def test_descriptors_in_the_middle_of_a_frame_are_refused_and_not_kept(at: int) -> None:
    data = frame(Extent("x", 1), payload=b"abcd")
    with victim() as (raw, target), open(os.devnull, "rb") as null:
        raw.sendall(data[:at])
        socket.send_fds(raw, [data[at:]], [null.fileno()] * 3)
        with pytest.raises(WireError, match="may not be there"):
            target.receive(PATIENCE, into=lambda _, n: bytearray(n))


def test_a_flood_of_descriptors_is_cut_off() -> None:
    with victim() as (raw, target), open(os.devnull, "rb") as null:
        for byte in frame(Wide(), fds=MAX_FDS)[:3]:
            socket.send_fds(raw, [bytes([byte])], [null.fileno()] * 200)
        with pytest.raises(WireError, match="no room"):
            target.receive(PATIENCE)


def test_descriptors_that_this_process_has_no_number_for_are_an_error() -> None:
    code = """
import os, resource, socket, sys
from sllm_mini.errors import WireError
from sllm_mini.wire import Channel, Message
class Extent(Message, frozen=True):
    max_fds = 200
left, right = socket.socketpair()
a, b = Channel(left, Extent, name="a"), Channel(right, Extent, name="b")
null = os.open(os.devnull, os.O_RDONLY)
before = len(os.listdir("/proc/self/fd"))
a.send(Extent(), fds=[null] * 100)
resource.setrlimit(resource.RLIMIT_NOFILE, (before + 20, before + 20))
try:
    b.receive(20)
except WireError as error:
    assert "no room" in str(error), error
    assert len(os.listdir("/proc/self/fd")) == before
    sys.exit(42)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 42, done.stderr


# What this side must not send


class Unbounded(Message, frozen=True):
    size: Annotated[int, msgspec.Meta(le=10)]


@pytest.mark.parametrize(
    ("send", "reason"),
    [
        (lambda a: a.send(Unbounded(11)), "breaks its own schema"),
        (lambda a: a.send(Block("one")), "breaks its own schema"),  # type: ignore[arg-type]
        (lambda a: a.send(Block(1 << 70)), "breaks its own schema"),
        (lambda a: a.send(Block(object())), "breaks its own schema"),  # type: ignore[arg-type]
        (lambda a: a.send(Extent("x" * 5000, 1)), "5,0.. bytes and the channel takes 4,096"),
        (lambda a: a.send(Block(1), fds=[0]), "may carry 0 descriptors"),
        (lambda a: a.send(Wide(), fds=[0] * 254), "may carry 253 descriptors"),
        (lambda a: a.send(Extent("x", 1), fds=[1 << 20]), "Bad file descriptor"),
    ],
)
def test_a_message_that_cannot_go_is_refused_with_nothing_sent(send: Callable[[Channel[Any]], None], reason: str) -> None:
    with pair(max_nbytes=4096) as (a, b):
        with pytest.raises(WireError, match=reason):
            send(a)
        a.send(Block(2))
        assert b.receive(PATIENCE).message == Block(2)


class Loose(msgspec.Struct):
    x: int


class Row(NamedTuple):
    x: int


class HoldsAny(Message, frozen=True):
    x: dict[str, list[Any]]


class HoldsLoose(Message, frozen=True):
    x: list[Loose | None]


class HoldsObject(Message, frozen=True):
    x: object


class Tree(Message, frozen=True):
    children: list[Tree] = msgspec.field(default_factory=list)


@pytest.mark.parametrize("loose", [Loose, int, Extent | None, list[Extent], HoldsAny, HoldsLoose, HoldsObject, Extent | HoldsAny])
def test_a_schema_that_leaves_anything_unchecked_makes_no_channel(loose: Any) -> None:
    with pytest.raises(ValueError, match=r"Message|unknown fields|not checked"):
        decoder(loose)


def test_a_schema_may_be_recursive_and_too_deep_a_message_is_an_error() -> None:
    deep = Tree()
    for _ in range(100_000):
        deep = Tree([deep])
    left, right = socket.socketpair()
    with Channel(left, Tree, name="left", max_nbytes=1 << 28) as a, Channel(right, Tree, name="right") as b:
        a.send(Tree([Tree(), Tree()]))
        assert b.receive(PATIENCE).message == Tree([Tree(), Tree()])
        with pytest.raises(WireError, match="breaks its own schema"):
            a.send(deep)
    while deep.children:  # freed from the outside in, or freeing it recurses as deep as it is
        deep = deep.children.pop()


# Time, ends and threads


def test_a_timeout_before_the_first_byte_leaves_the_channel_usable() -> None:
    with pair() as (a, b):
        with pytest.raises(WireTimeout, match="no message came in time") as caught:
            b.receive(timeout=0.02)
        assert not caught.value.ended
        with pytest.raises(WireTimeout):
            b.receive(timeout=0)
        a.send(Block(1))
        assert b.receive(timeout=0).message == Block(1)


@pytest.mark.parametrize("sent", [1, 20, 25, -1])
def test_a_timeout_within_a_frame_ends_the_channel(sent: int) -> None:
    with victim() as (raw, target):
        raw.sendall(frame(Block(1), payload=b"1234")[:sent])
        with pytest.raises(WireTimeout, match="was not complete in time") as caught:
            target.receive(timeout=0.05, into=lambda _, n: bytearray(n))
        assert caught.value.ended
        with pytest.raises(ChannelClosed, match="earlier failure"):
            target.receive(PATIENCE)


def test_a_peer_that_trickles_bytes_does_not_stretch_the_deadline() -> None:
    with victim() as (raw, target):
        stop = threading.Event()

        def trickle() -> None:
            for byte in frame(Extent("x" * 5000, 1)):
                if stop.wait(0.005):
                    return
                with contextlib.suppress(OSError):
                    raw.send(bytes([byte]))

        thread, _ = in_thread(trickle)
        with pytest.raises(WireTimeout):
            target.receive(timeout=0.1)
        stop.set()
        thread.join(PATIENCE)


def test_a_peer_that_does_not_read_times_out_the_sender() -> None:
    with pair() as (a, b):
        with pytest.raises(WireTimeout, match="the peer does not read") as caught:
            a.send(Block(1), payload=bytes(8 << 20), timeout=0.05)
        assert caught.value.ended
        with pytest.raises(WireError, match="ended after"):
            b.receive(PATIENCE, into=lambda _, n: bytearray(n))
    with pair() as (a, b):
        sent = 0
        with pytest.raises(WireTimeout) as caught:
            while True:
                a.send(Extent("x" * 900, sent), timeout=0.02)
                sent += 1
        if not caught.value.ended:  # the last frame found no room at all: everything before it is whole
            for i in range(sent):
                assert b.receive(PATIENCE).message.nbytes == i
            a.send(Block(1))
            assert b.receive(PATIENCE).message == Block(1)


def test_sending_to_a_peer_that_is_gone_says_so_and_its_last_words_can_still_be_read() -> None:
    with pair() as (a, b):
        b.send(Extent("goodbye", 1))
        b.close()
        with pytest.raises(ChannelClosed, match="left: the peer closed the channel before Block was sent"):
            a.send(Block(1))
        assert a.receive(PATIENCE).message == Extent("goodbye", 1)
        with pytest.raises(ChannelClosed, match="the peer closed"):
            a.receive(PATIENCE)


def test_waiting_for_other_threads_counts_against_the_deadline(tmp_path: Path) -> None:
    with pair() as (a, b), listen(tmp_path / "s") as listener:
        waiting = [in_thread(lambda: a.receive()), in_thread(lambda: listener.accept())]
        time.sleep(0.05)
        for wait in (a.receive, listener.accept):
            with pytest.raises(WireTimeout, match="other threads"):
                wait(timeout=0.02)
        b.send(Block(1))
        listener.close()
        for thread, results in waiting:
            thread.join(PATIENCE)
            assert not isinstance(results[0], WireTimeout)


def test_closing_wakes_a_reader_and_a_writer() -> None:
    with pair() as (a, b):
        reader, read = in_thread(lambda: a.receive())
        writer, wrote = in_thread(lambda: a.send(Block(1), payload=bytes(8 << 20)))
        time.sleep(0.05)
        a.close()
        a.close()
        reader.join(PATIENCE)
        writer.join(PATIENCE)
        assert isinstance(read[0], ChannelClosed) and "closed on this side" in str(read[0])
        assert isinstance(wrote[0], ChannelClosed)
        with pytest.raises(ChannelClosed, match="closed on this side"):
            a.send(Block(1))
        assert b.name == "right"


def test_closing_within_a_receive_is_an_end_and_no_deadlock() -> None:
    with pair() as (a, b):
        a.send(Block(1), payload=b"abc")

        def close(message: object, nbytes: int) -> bytearray:
            b.close()
            return bytearray(nbytes)

        with pytest.raises(ChannelClosed, match="closed on this side"):
            b.receive(PATIENCE, into=close)


def test_many_threads_send_and_receive_whole_frames_both_ways_at_once() -> None:
    per_thread, threads = 100, 4
    with pair() as (a, b):

        def send(target: Channel[Any], first: int) -> None:
            for i in range(first, first + per_thread):
                target.send(Block(i), payload=bytes([i % 251]) * (i * 37 % 9000), timeout=PATIENCE)

        def receive(target: Channel[Any]) -> list[int]:
            layers = []
            for _ in range(per_thread * threads // 2):
                got = target.receive(PATIENCE, into=lambda _, n: bytearray(n))
                layer = got.message.layer
                assert bytes(got.payload or b"") == bytes([layer % 251]) * (layer * 37 % 9000)
                layers.append(layer)
            return layers

        senders = [in_thread(functools.partial(send, side, i * per_thread)) for side in (a, b) for i in range(threads)]
        readers = [in_thread(functools.partial(receive, side)) for side in (a, a, b, b)]
        for thread, _ in senders + readers:
            thread.join(PATIENCE)
        for both in (readers[:2], readers[2:]):
            assert sorted(layer for _, result in both for layer in result[0]) == list(range(per_thread * threads))  # type: ignore[attr-defined]


# Listening and connecting


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "store.sock"


def test_two_processes_find_each_other_and_pass_memory(place: Path) -> None:
    code = """
import os, sys
from sllm_mini.wire import Channel, Message, connect
class Extent(Message, frozen=True):
    name: str
    nbytes: int
    max_fds = 2
with Channel(connect(sys.argv[1], timeout=20), Extent, name="server") as target:
    fd = os.memfd_create("weights")
    os.write(fd, b"from another process")
    target.send(Extent("weights", 20), fds=[fd])
    assert target.receive(20).message.name == "thanks"
"""
    with listen(place) as listener:
        child = subprocess.Popen([sys.executable, "-c", code, str(place)])
        with Channel(listener.accept(PATIENCE), Extent, name="client") as target:
            with target.receive(PATIENCE) as got:
                assert os.pread(got.fds[0], got.message.nbytes, 0) == b"from another process"
            assert peer(target._sock).pid == child.pid
            target.send(Extent("thanks", 0))
            assert child.wait(PATIENCE) == 0
            with pytest.raises(ChannelClosed):
                target.receive(PATIENCE)


def test_a_socket_is_private_whatever_the_umask_and_gone_when_closed(place: Path) -> None:
    old = os.umask(0)
    try:
        with listen(place) as listener:
            assert stat.S_IMODE(place.stat().st_mode) == 0o600
            assert os.umask(0) == 0
            assert listener.address == str(place)
        assert not place.exists()
        listener.close()
    finally:
        os.umask(old)


def test_a_live_server_keeps_its_path_and_a_stale_socket_gives_it_up(place: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(place))
    with listen(place) as first:
        with pytest.raises(WireError, match="a server listens there already"):
            listen(place)
        first.accept(PATIENCE).close()  # the look of the second one; the first lives on
        with connect(place), first.accept(PATIENCE):
            pass


def test_a_busy_server_keeps_its_path_and_connecting_to_it_times_out(place: Path) -> None:
    with listen(place, backlog=1) as listener:
        waiting = [connect(place) for _ in range(2)]
        with pytest.raises(WireError, match="busy server"):
            listen(place)
        with pytest.raises(WireTimeout, match="no connection in time"):
            connect(place, timeout=0.02)
        for sock in waiting:
            listener.accept(PATIENCE).close()
            sock.close()


def test_a_listener_removes_only_its_own_socket(place: Path) -> None:
    first = listen(place)
    place.unlink()
    with listen(place):
        first.close()
        assert place.exists()


def test_of_many_servers_that_start_together_over_a_stale_socket_one_wins(place: Path) -> None:
    for _ in range(5):
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(place))
        barrier = threading.Barrier(6)

        def start(barrier: threading.Barrier = barrier) -> object:
            barrier.wait(PATIENCE)
            return listen(place)

        started = [in_thread(start) for _ in range(6)]
        for thread, _ in started:
            thread.join(PATIENCE)
        winners = [results[0] for _, results in started if not isinstance(results[0], WireError)]
        assert len(winners) == 1
        with connect(place):
            pass
        winners[0].close()  # type: ignore[attr-defined]


def test_one_listener_at_a_time_looks_at_a_folder(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = os.open(place.parent, os.O_RDONLY)
    try:
        look = listener_module._remove_stale

        def look_while_trying_the_lock(path: str) -> None:
            with pytest.raises(BlockingIOError):
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            look(path)

        monkeypatch.setattr(listener_module, "_remove_stale", look_while_trying_the_lock)
        listen(place).close()
        monkeypatch.setattr(listener_module, "_LOCK_SECONDS", 0.05)
        fcntl.flock(folder, fcntl.LOCK_EX)
        with pytest.raises(WireError, match="keeps this folder locked"):
            listen(place)
    finally:
        os.close(folder)


@pytest.mark.parametrize("kind", ["file", "folder", "link", "datagram", "missing folder", "long"])
def test_a_path_that_cannot_be_a_socket_is_refused_and_left_alone(tmp_path: Path, kind: str) -> None:
    place = tmp_path / ("x" * 120 if kind == "long" else "store.sock")
    if kind == "file":
        place.write_text("precious")
    elif kind == "folder":
        place.mkdir()
    elif kind == "link":
        (tmp_path / "precious").write_text("precious")
        place.symlink_to(tmp_path / "precious")
    elif kind == "datagram":
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.bind(str(place))
            with pytest.raises(WireError):
                listen(place)
        place.unlink()
        place.write_text("precious")
    elif kind == "missing folder":
        place = tmp_path / "none" / "store.sock"
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(WireError, match=place.name[:20]):
        listen(place)
    with pytest.raises(WireError):
        connect(place)
    assert sorted(os.listdir(tmp_path)) == before
    if kind in ("file", "link"):
        assert place.read_text() == "precious"


def test_nobody_listening_is_an_error_that_says_so(place: Path) -> None:
    with pytest.raises(WireError, match="no server answers there"):
        connect(place, timeout=1)


def test_another_user_is_refused_on_both_sides(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = os.geteuid()
    with listen(place) as listener:
        with connect(place) as sock:
            monkeypatch.setattr(os, "geteuid", lambda: own + 1)
            with pytest.raises(WireTimeout):
                listener.accept(0.05)
            sock.settimeout(PATIENCE)
            assert sock.recv(1) == b""  # closed on it
        with pytest.raises(WireError, match=f"runs as user {own}"):
            connect(place)
        monkeypatch.undo()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
def test_another_user_cannot_open_the_socket(tmp_path: Path, place: Path) -> None:
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.geteuid() and not folder.stat().st_mode & 0o001:
            folder.chmod(folder.stat().st_mode | 0o001)
    code = "import os, socket, sys; os.setuid(65534); s = socket.socket(socket.AF_UNIX)\ntry: s.connect(sys.argv[1])\nexcept PermissionError: sys.exit(42)"
    with listen(place):
        assert subprocess.run([sys.executable, "-S", "-c", code, str(place)], check=False).returncode == 42


def test_closing_a_listener_wakes_accept(place: Path) -> None:
    listener = listen(place)
    thread, results = in_thread(lambda: listener.accept())
    time.sleep(0.05)
    listener.close()
    thread.join(PATIENCE)
    assert isinstance(results[0], ChannelClosed)
    with pytest.raises(ChannelClosed):
        listener.accept()


def test_accept_that_meets_the_close_of_another_thread_ends_as_closed(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class ClosedInBetween:
        def accept(self) -> object:
            listener._closed = True
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))  # Linux's answer on a socket that was shut down

    with listen(place) as listener, monkeypatch.context() as patch:
        patch.setattr(listener, "_sock", ClosedInBetween())
        with pytest.raises(ChannelClosed):
            listener.accept(PATIENCE)


def test_a_listener_out_of_descriptors_says_so_and_lives_on(place: Path) -> None:
    with listen(place) as listener:
        waiting = connect(place)
        held: list[int] = []
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (fd_count() + 8, hard))
        try:
            with contextlib.suppress(OSError):
                while True:
                    held.append(os.dup(waiting.fileno()))
            with pytest.raises(WireError, match="Too many open files"):
                listener.accept(PATIENCE)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for fd in held:
                os.close(fd)
        listener.accept(PATIENCE).close()
        waiting.close()


def test_the_header_is_what_the_module_says() -> None:
    left, right = socket.socketpair()
    with channel(left, "left") as a, right:
        a.send(Block(1), payload=b"xyz")
        data = right.recv(4096)
    body = msgspec.msgpack.encode(Block(1))
    assert data == b"SLM\x01" + bytes(4) + struct.pack("<I", len(body)) + struct.pack("<Q", 3) + body + b"xyz"
    assert array.array("i").itemsize == 4


_TOGETHER = """
import sys, threading
from typing import Annotated
import msgspec
from sllm_mini.wire import Message
from sllm_mini.wire.message import decoder
sys.setswitchinterval(1e-6)
parts = [msgspec.defstruct(f"Part{n}", [("a", Annotated[int, msgspec.Meta(ge=0)]), ("b", list[int])], bases=(Message,), frozen=True) for n in range(60)]
whole = msgspec.defstruct("Whole", [(f"f{n}", part) for n, part in enumerate(parts)], bases=(Message,), frozen=True)
raw = msgspec.msgpack.encode(whole(*(part(1, [1]) for part in parts)))
begin = threading.Barrier(4)
def read():
    begin.wait()
    decoder(whole).decode(raw)
threads = [threading.Thread(target=read) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""


def test_threads_that_need_one_decoder_first_at_the_same_time_all_get_a_whole_one() -> None:
    """Without the lock some of these processes end by SIGSEGV."""
    running = [subprocess.Popen([sys.executable, "-c", _TOGETHER]) for _ in range(6)]
    assert [process.wait(60) for process in running] == [0] * 6
