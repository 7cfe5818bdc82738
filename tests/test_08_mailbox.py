"""Chapter 08: whatever becomes of the frames between a driver and a node, each message arrives once and in order."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import Meta

from sllm_mini.cluster.nodes.mailbox import Conversation, Letter, Mailbox
from sllm_mini.errors import WireError
from sllm_mini.wire import Channel, ChannelClosed, Message, WireTimeout

AGAIN = 2.0
SECONDS = 20.0


class Note(Message, frozen=True):
    text: Annotated[str, Meta(max_length=100)]


class Frame(Message, frozen=True):
    number: int
    taken: int
    message: Note | None


class Wire:
    """Both ends, and what is on its way from each. Time is a number."""

    def __init__(self) -> None:
        self.ends: tuple[Mailbox[Note, Note], Mailbox[Note, Note]] = (Mailbox(AGAIN), Mailbox(AGAIN))
        self.under_way: tuple[list[tuple[int, int, Note | None, bytes]], ...] = ([], [])
        self.posted: tuple[list[str], ...] = ([], [])
        self.got: tuple[list[str], ...] = ([], [])
        self.now = 0.0

    def post(self, end: int) -> None:
        text = f"{end}:{len(self.posted[end])}"
        self.posted[end].append(text)
        self.ends[end].post(Note(text), text.encode())

    def send(self, end: int) -> None:
        letters: list[Any] = [*self.ends[end].due(self.now), Letter(0, None, b"")]  # the last is a beat
        self.under_way[end].extend((letter.number, self.ends[end].taken, letter.message, letter.payload) for letter in letters)

    def deliver(self, end: int, which: int) -> None:
        """The frame is left where it is: it may come again."""
        number, taken, message, payload = self.under_way[end][which]
        other = self.ends[1 - end]
        other.acknowledge(taken)
        if message is not None:
            for note, with_it in other.take(number, message, payload):
                assert with_it == note.text.encode()
                self.got[end].append(note.text)

    def check(self) -> None:
        for end in (0, 1):
            assert self.got[end] == self.posted[end][: len(self.got[end])]

    def settle(self) -> None:
        """From now on nothing is lost."""
        for _ in range(2):
            self.now += AGAIN
            for end in (0, 1):
                self.under_way[end].clear()
                self.send(end)
                for which in range(len(self.under_way[end])):
                    self.deliver(end, which)
        self.under_way[0].clear()
        self.send(0)
        self.deliver(0, -1)


ACTIONS = st.lists(
    st.tuples(st.sampled_from(["post", "post", "send", "send", "deliver", "deliver", "lose", "wait"]), st.integers(0, 1), st.integers(0, 1000)), max_size=120
)


@settings(max_examples=300)
@given(ACTIONS)
def test_lost_doubled_late_and_overtaken_frames_change_nothing(actions: list[tuple[str, int, int]]) -> None:
    wire = Wire()
    for what, end, number in actions:
        under_way = wire.under_way[end]
        if what == "post":
            wire.post(end)
        elif what == "send":
            wire.send(end)
        elif what == "wait":
            wire.now += AGAIN / 2
        elif under_way and what == "deliver":
            wire.deliver(end, number % len(under_way))
        elif under_way and what == "lose":
            del under_way[number % len(under_way)]
        wire.check()
    wire.settle()
    assert wire.got == wire.posted
    for box in wire.ends:
        assert not box.due(wire.now + 100 * AGAIN), "what was acknowledged is kept"


def test_what_is_not_acknowledged_goes_again_and_not_before_its_time() -> None:
    box: Mailbox[Note, Note] = Mailbox(AGAIN)
    for text in "abc":
        box.post(Note(text))
    assert [letter.number for letter in box.due(0.0)] == [1, 2, 3] and box.due(AGAIN - 0.1) == []
    box.acknowledge(2)
    box.acknowledge(1)  # overtaken
    assert [letter.message for letter in box.due(AGAIN)] == [Note("c")] and box.due(AGAIN) == []
    with pytest.raises(WireError, match="4 was acknowledged and 3 were sent"):
        box.acknowledge(4)


def test_what_comes_long_before_its_time_is_not_kept() -> None:
    box: Mailbox[Note, Note] = Mailbox(AGAIN)
    assert box.take(2, Note("b")) == [] and box.take(10**6, Note("x")) == []
    assert [note.text for note, _ in box.take(1, Note("a"))] == ["a", "b"]
    assert box.taken == 2 and box.take(2, Note("again")) == [] and not box._ahead


@contextmanager
def talking(max_payload_nbytes: int = 1 << 10, *, speaking: bool = True) -> Iterator[tuple[Any, Any, Callable[[], Channel], Callable[[], Channel]]]:
    """Two conversations that speak over a socket pair, and the channels."""
    channels = [Channel(sock, Frame, name="the other end") for sock in socket.socketpair()]
    ends: list[Conversation[Note, Note]] = [Conversation(Frame, 0.02, 1.0, max_payload_nbytes=max_payload_nbytes) for _ in channels]
    threads = [threading.Thread(target=_speak, args=(end, channel)) for end, channel in zip(ends, channels, strict=True) if speaking]
    for thread in threads:
        thread.start()
    try:
        yield ends[0], ends[1], lambda: channels[0], lambda: channels[1]
    finally:
        for end in ends:
            end.end()
        for thread in threads:
            thread.join()
        for channel in channels:
            channel.close()


def _speak(end: Conversation[Note, Note], channel: Channel) -> None:
    try:
        end.speak(channel)
    except ChannelClosed:
        return


def test_a_conversation_beats_and_says_its_last_past_everything() -> None:
    with talking() as (one, other, mine, its):
        assert one.hear(mine(), SECONDS) == []  # a beat
        other.post(Note("a"), b"payload")
        other.post(Note("b"))
        got = [pair for _ in range(2) for pair in heard(one, mine())]
        assert got == [(Note("a"), b"payload"), (Note("b"), b"")]
        other.end()
        other.post(Note("never said"))
        other.last(its(), Note("the end"))
        assert heard(one, mine()) == [(Note("the end"), b"")]
        with pytest.raises(WireTimeout):
            one.hear(mine(), 0.2)


def heard(end: Any, channel: Channel) -> list[tuple[Note, bytes]]:
    while not (found := end.hear(channel, SECONDS)):
        pass
    return found


def test_what_breaks_its_schema_or_is_too_large_is_an_error_where_it_is_said() -> None:
    with talking(speaking=False) as (one, other, mine, its):
        one.post(Note("x" * 101))
        with pytest.raises(WireError, match="schema"):
            one.speak(mine())
        other.last(its(), Note("usable still"))
        assert heard(one, mine()) == [(Note("usable still"), b"")]


def test_with_somebody_who_is_told_what_cannot_be_said_is_left_out_and_nothing_else() -> None:
    refused: list[tuple[Note, str]] = []
    with talking(speaking=False) as (one, other, mine, its):
        other._on_refused = lambda note, error: refused.append((note, str(error)))
        for note in (Note("a"), Note("x" * 101), Note("b"), Note("y" * 101), Note("c")):
            other.post(note)
        speaking = threading.Thread(target=_speak, args=(other, its()))
        speaking.start()
        assert [note.text for _ in range(3) for note, _ in heard(one, mine())] == ["a", "b", "c"]
        other.end()
        speaking.join()
    assert [note.text[0] for note, _ in refused] == ["x", "y"] and all("schema" in why for _, why in refused)


def test_a_payload_that_is_too_large_is_refused_where_it_is_heard() -> None:
    with talking(max_payload_nbytes=8) as (one, other, mine, _):
        other.post(Note("x"), b"123456789")
        with pytest.raises(WireError, match="9 bytes was announced and at most 8"):
            heard(one, mine())
