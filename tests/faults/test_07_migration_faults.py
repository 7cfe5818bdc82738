"""Moves in which something dies or is lost, at every message of the protocol. Chapter 07.

The engines are doubles whose whole text is known beforehand (`fake_engine`), so that "the right text" is exact: every
token of every request, each once, in order, and one owner at the end.
"""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import fake_engine
import pytest
from fake_engine import FakeEngine, whole_text
from moving import Event, FaultyChannel, Side, World
from store_process import eventually

from sllm_mini.errors import ModelError, WireError
from sllm_mini.inference import migration
from sllm_mini.inference.migration import MigrationTarget, MoveOptions, Speeds, messages
from sllm_mini.inference.ownership import server
from sllm_mini.inference.ownership.register import Ownership
from sllm_mini.inference.sampler import SamplingOptions
from sllm_mini.inference.session import Session
from sllm_mini.inference.workers import Workers
from sllm_mini.types import Epoch
from sllm_mini.wire import Channel

MODES = ("tokens", "kv", "stop_and_copy")
QUICK = MoveOptions(answer_seconds=0.6, stopped_seconds=0.6, max_rounds=2, block_nbytes=64)


def session(request_id: str = "story", *, seed: int = 3, max_new_tokens: int = 40) -> Session:
    prompt = tuple(range(20, 32))
    return Session(request_id, "fake", prompt, len(prompt), max_new_tokens, SamplingOptions(seed=seed), stop_at_eos=False)


@pytest.fixture(autouse=True)
def two_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every move has the same messages: two rounds, with three steps of the source in each."""
    monkeypatch.setattr(migration, "should_hand_over", lambda gap, previous, *, rounds_left, target_gap_tokens: rounds_left == 0)
    monkeypatch.setattr(migration.target, "FIRST_TOKEN_SECONDS", 0.2)


def a_world() -> World:
    world = World(lambda name: FakeEngine())
    world.submit("source", session())
    world["destination"].start()
    for _ in range(4):
        world["source"].engine.step()
    return world


def stepping(side: Side, event: Event) -> None:
    """The source decodes on while it waits for an answer of a round."""
    if event.what == "sent" and event.kind in ("Begin", "Tokens", "Blocks"):
        side.engine.step()


def events_of(mode: str) -> list[Event]:
    """All that happens in a move of this mode that nothing disturbs."""
    happened: list[Event] = []
    with a_world() as world:
        for side in world.sides.values():
            def hook(event: Event, side: Side = side) -> None:
                happened.append(event)
                if side.name == "source":
                    stepping(side, event)

            side.hook = hook
        report = world.move("story", mode=mode, options=QUICK)
        assert report is not None and report.outcome == "moved", report
        world.start()
        assert world.read("story") == whole_text(session())
    return happened


@pytest.fixture(scope="module")
def every_event() -> dict[str, list[Event]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(migration, "should_hand_over", lambda gap, previous, *, rounds_left, target_gap_tokens: rounds_left == 0)
        return {mode: events_of(mode) for mode in MODES}


def test_a_move_has_the_messages_that_the_faults_below_are_put_at(every_event: dict[str, list[Event]]) -> None:
    for mode, happened in every_event.items():
        sent = [event.kind for event in happened if event.what == "sending" and event.who == "source"]
        rounds = {"tokens": ["Tokens"] * 2, "kv": ["Blocks"] * 6, "stop_and_copy": ["Blocks"] * 4}[mode]
        assert sent == ["Begin", *rounds, "HandOver", "Await"], (mode, sent)
        assert [event.who for event in happened if event.what == "claimed"] == ["destination"]


@pytest.mark.parametrize("noticed", ["at once", "late"])
@pytest.mark.parametrize("victim", ["source", "destination"])
@pytest.mark.parametrize("mode", MODES)
def test_either_side_dies_at_every_message_and_the_client_notices_nothing(every_event: dict[str, list[Event]], mode: str, victim: str, noticed: str) -> None:
    owners = []
    for fatal in every_event[mode]:
        with a_world() as world:
            killed = kill_at(world, fatal, victim, world.notice if noticed == "at once" else None)
            report = world.move("story", mode=mode, options=QUICK)
            assert killed, f"{fatal} did not come"
            if noticed == "late":
                world.notice(victim)
            survivor = "destination" if victim == "source" else "source"
            world.start()
            assert world.read("story") == whole_text(session()), (fatal, report)
            assert world.register.owner("story").owner == survivor, (fatal, report)
            assert world[survivor].engine.guests == (), (fatal, report)
            owners.append(report.owner if report else None)
    assert len(owners) == len(every_event[mode])


def kill_at(world: World, fatal: Event, victim: str, then: Any) -> list[Event]:
    """Kills the victim at that moment; the list says that it came."""
    came: list[Event] = []
    for side in world.sides.values():
        def hook(event: Event, side: Side = side) -> None:
            if event == fatal and not came:
                came.append(event)
                world[victim].kill()
                if then is not None:
                    then(victim)
            elif side.name == "source" and side.alive:
                stepping(side, event)

        side.hook = hook
    return came


@pytest.mark.parametrize("deed", ["drop", "twice"])
@pytest.mark.parametrize("mode", MODES)
def test_a_message_that_is_lost_or_comes_twice_changes_nothing(every_event: dict[str, list[Event]], mode: str, deed: Any) -> None:
    for event in every_event[mode]:
        if event.what != "sending":
            continue
        with a_world() as world:
            disturb(world, lambda happened, event=event: deed if happened == event else None)
            report = world.move("story", mode=mode, options=QUICK)
            assert report is not None and (report.outcome, report.owner, report.epoch) == ("moved", "destination", 2), (event, report)
            world.start()
            assert world.read("story") == whole_text(session()), event
            said = sum(piece.epoch == 1 for piece in world.ledger.pieces("story"))
            cached, _ = world["destination"].engine.kv_at_adoption["story"]  # whose bytes the double has compared
            missing = session().prompt_length + said - 1 - cached  # what the first step there computes beside its token
            assert 0 <= missing <= (4 if mode == "tokens" else 0), event


def disturb(world: World, choose: Any) -> None:
    for side in world.sides.values():
        def hook(event: Event, side: Side = side) -> Any:
            if side.name == "source":
                stepping(side, event)
            return choose(event)

        side.hook = hook


# --- silence, and two owners who do not know of each other ------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_a_destination_that_is_silent_from_the_hand_over_on_leaves_one_owner(mode: str) -> None:
    """Every answer is lost from the hand-over on: the destination has the request and the source learns it from the register."""
    with a_world() as world:
        disturb(world, lambda event: "drop" if event.what == "sending" and event.kind == "Took" else None)
        report = world.move("story", mode=mode, options=QUICK)
        assert report is not None and (report.outcome, report.owner, report.epoch) == ("moved", "destination", 2), report
        assert world["source"].engine.requests == () and report.pause_seconds is None
        world.start()
        assert world.read("story") == whole_text(session())


@pytest.mark.parametrize("mode", MODES)
def test_a_hand_over_that_never_arrives_is_claimed_back_by_the_source(mode: str) -> None:
    with a_world() as world:
        disturb(world, lambda event: "drop" if event.what == "sending" and event.kind == "HandOver" else None)
        report = world.move("story", mode=mode, options=QUICK)
        assert report is not None and (report.outcome, report.owner, report.epoch) == ("stayed", "source", 2), report
        assert world["destination"].engine.guests == world["destination"].engine.requests == ()
        world.start()
        assert world.read("story") == whole_text(session())


@pytest.mark.parametrize("mode", MODES)
def test_a_destination_that_claims_too_late_forgets_the_request(mode: str) -> None:
    """It was slow, the source has claimed back and gone on: its claim is refused, and it says nothing."""
    with a_world() as world:
        claimed = threading.Event()

        def hook(event: Event) -> None:
            if (event.who, event.what) == ("destination", "claiming"):
                assert claimed.wait(5)
            elif (event.who, event.what) == ("source", "claimed"):
                claimed.set()
            elif event.who == "source":
                stepping(world["source"], event)

        for side in world.sides.values():
            side.hook = hook
        report = world.move("story", mode=mode, options=QUICK)
        assert report is not None and (report.outcome, report.owner, report.epoch) == ("stayed", "source", 2), report
        assert world["destination"].engine.guests == world["destination"].engine.requests == ()
        world.start()
        assert world.read("story") == whole_text(session())


def test_an_owner_that_lives_on_unnoticed_is_not_believed() -> None:
    """The router took the source for dead and began its request again elsewhere; the source steps on, and nobody hears it."""
    with a_world() as world:
        speaking = world["source"].feed._speakers["story"].generation
        world["source"].engine.step_seconds = 0.02
        world["source"].feed.flush("story", 5)
        begun = world.ledger.restart("story", "destination", 1)
        assert begun is not None
        world["destination"].feed.adopt(*begun)
        world.start()
        assert world.read("story") == whole_text(session())
        said = [piece.epoch for piece in world.ledger.pieces("story")]
        assert said == sorted(said) and set(said) == {1, 2}
        eventually(lambda: world["source"].engine.requests == ())
        assert speaking is not None and speaking.finish == "moved", "it was dropped before its text was whole"


def test_a_destination_that_cannot_go_on_gives_the_request_back(monkeypatch: pytest.MonkeyPatch) -> None:
    with a_world() as world:
        def broken(*_: Any, **__: Any) -> None:
            raise ModelError("no slot is left")

        monkeypatch.setattr(world["destination"].engine, "adopt", broken)
        disturb(world, lambda event: None)
        report = world.move("story", mode="kv", options=QUICK)
        assert report is not None and (report.outcome, report.owner, report.epoch) == ("stayed", "source", 3) and "no slot" in report.reason
        assert world["destination"].engine.guests == ()
        world.start()
        assert world.read("story") == whole_text(session())


@pytest.mark.parametrize("lost", ["claim", "release"])
def test_a_destination_that_does_not_learn_what_it_claimed_leaves_the_request_to_the_source(monkeypatch: pytest.MonkeyPatch, lost: str) -> None:
    """The register has it as the destination's, whose answer from there is lost: it fails, and nobody would run the request."""
    with a_world() as world:
        there = world["destination"]
        real = getattr(there.register, lost)

        def losing(*args: Any, **options: Any) -> Any:
            if lost == "claim":
                real(*args, **options)
            raise WireError("the arbiter's answer is lost")

        def broken(*_: Any, **__: Any) -> None:
            raise ModelError("no slot is left")

        monkeypatch.setattr(there.register, lost, losing)
        if lost == "release":
            monkeypatch.setattr(there.engine, "adopt", broken)
        report = world.move("story", options=QUICK)
        assert report is not None and (report.outcome, report.owner, report.epoch) == ("stayed", "source", 3), report
        assert ("no slot" if lost == "release" else "answer is lost") in report.reason and there.engine.guests == there.engine.requests == ()
        world.start()
        assert world.read("story") == whole_text(session())


def test_a_source_that_was_refused_takes_the_request_from_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody else claimed it before the destination, which does not learn that either."""
    with a_world() as world:
        there = world["destination"]

        def beaten(request_id: str, owner: str, expected_epoch: int, **_: Any) -> Any:
            assert world.register.claim(request_id, "third", expected_epoch) == 2
            raise WireError("the arbiter's answer is lost")

        monkeypatch.setattr(there.register, "claim", beaten)
        report = world.move("story", options=QUICK)
        assert report is not None and (report.outcome, report.owner, report.epoch) == ("moved", "third", 2), report
        assert world["source"].engine.requests == there.engine.guests == () and world.register.owner("story") == ("third", 2)


def test_the_register_is_asked_a_bounded_number_of_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """The longest course: every claim comes too late, and every time it is nobody's."""
    with a_world() as world:
        source, asked = world["source"], []

        def late(*_: Any, **__: Any) -> None:
            asked.append("claim")

        def nobody(_: str) -> Ownership:
            asked.append("owner")
            return Ownership(None, Epoch(1 + len(asked)))

        def hook(event: Event) -> Any:
            if (event.who, event.what, event.kind) == ("source", "sending", "HandOver"):
                monkeypatch.setattr(source.register, "claim", late)
                monkeypatch.setattr(source.register, "owner", nobody)
                return "drop"
            return None

        disturb(world, hook)
        report = world.move("story", options=QUICK)
        assert report is not None and report.owner is None and asked == ["claim", "owner"] * 2
        assert len(asked) == migration.source.SETTLE_QUESTIONS
    assert MoveOptions().stopped_seconds + len(asked) * server.TRIES * server.ANSWER_SECONDS == migration.OWNER_SECONDS


def test_a_request_that_begins_again_during_its_move_is_left_alone() -> None:
    """Its source was taken for another's heir: the request speaks there in a new epoch, and the move was of the old one."""
    with a_world() as world:
        source = world["source"]

        def hook(event: Event) -> Any:
            if (event.who, event.what, event.kind, event.number) == ("source", "sent", "Tokens", 0):
                source.feed.flush("story", 5)
                begun = world.ledger.restart("story", "source", 1)
                assert begun is not None
                source.feed.adopt(*begun)
            return None

        disturb(world, hook)
        report = world.move("story", options=QUICK)
        assert report is not None and (report.outcome, report.owner, report.epoch) == ("ended", "source", 2), report
        assert world["destination"].engine.guests == ()
        world.start()
        assert world.read("story") == whole_text(session())


# --- how much goes in one message -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["kv", "stop_and_copy"])
@pytest.mark.parametrize("tokens", [1, 4, 5, 8])
def test_no_message_carries_more_than_a_block(monkeypatch: pytest.MonkeyPatch, mode: str, tokens: int) -> None:
    """Also the hand-over, where what is left after the stop is more: here all that came in the only round there is."""
    options = MoveOptions(max_rounds=1, block_nbytes=64)
    with a_world() as world:
        source, send = world["source"], FaultyChannel.send
        sent: list[int] = []

        def noting(self: FaultyChannel, message: Any, **rest: Any) -> None:
            if isinstance(message, (messages.Blocks, messages.HandOver)):
                session_nbytes = getattr(message, "session_nbytes", 0)
                sent.append(sum(memoryview(part).nbytes for part in rest["payload"]) - session_nbytes)
            send(self, message, **rest)

        monkeypatch.setattr(FaultyChannel, "send", noting)

        def hook(event: Event) -> Any:
            if (event.who, event.what, event.kind, event.number) == ("source", "received", "Has", 0):
                for _ in range(tokens):
                    source.engine.step()
            return None

        for side in world.sides.values():
            side.hook = hook
        report = world.move("story", mode=mode, options=options)
        assert report is not None and (report.outcome, report.rounds) == ("moved", int(mode == "kv")), report
        assert max(sent) <= options.block_nbytes and sum(sent) >= 16 * (15 + tokens) and report.nbytes >= sum(sent)
        world.start()
        assert world.read("story") == whole_text(session())


@pytest.mark.parametrize(("link", "mode"), [(1e3, "tokens"), (1e9, "kv")])
def test_a_mode_is_chosen_by_measured_speeds(link: float, mode: str) -> None:
    with a_world() as world:
        with pytest.raises(ValueError, match="chooses by speeds"):
            world.move("story", mode="auto", options=QUICK)
        report = world.move("story", mode="auto", speeds=Speeds(1e5, link, fake_engine.KV_NBYTES), options=QUICK)
        assert report is not None and (report.mode, report.outcome) == (mode, "moved")
        world.start()
        assert world.read("story") == whole_text(session())


# --- what ends a move before its hand-over ------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("left", range(1, 12))
def test_the_end_of_the_text_cancels_the_move(mode: str, left: int) -> None:
    """The text ends while the move is on its way, at one message after another."""
    story = session(max_new_tokens=4 + left)
    with World(lambda name: FakeEngine()) as world:
        world.submit("source", story)
        for _ in range(4):
            world["source"].engine.step()
        disturb(world, lambda event: None)
        world["destination"].start()
        report = world.move("story", mode=mode, options=QUICK)
        assert report is not None
        moved = report.outcome == "moved"
        assert moved == (left > {"tokens": 3, "kv": 7, "stop_and_copy": 1}[mode]), report
        assert moved or (report.outcome, report.owner) == ("ended", "source"), report
        assert world["destination"].engine.guests == ()
        assert world.read("story") == whole_text(story)


def test_a_destination_of_other_weights_refuses_and_the_source_goes_on() -> None:
    with World(lambda name: FakeEngine("fake" if name == "source" else "another")) as world:
        world.submit("source", session())
        world["source"].engine.step()
        report = world.move("story", mode="kv", options=QUICK)
        assert report is not None and (report.outcome, report.owner, report.epoch) == ("stayed", "source", 1) and "another" in report.reason
        world.start()
        assert world.read("story") == whole_text(session())


def test_a_request_that_has_ended_cannot_be_moved() -> None:
    with World(lambda name: FakeEngine()) as world:
        world.submit("source", session(max_new_tokens=2))
        while world["source"].engine.step():
            pass
        with pytest.raises(ModelError, match="is source's and does not run: its text has ended"):
            world.move("story")


def test_a_request_is_moved_by_one_caller_at_a_time() -> None:
    """Three at once: two are refused, the first goes its way, and nothing of it is remembered."""
    with a_world() as world:
        refusals: list[str] = []

        def hook(event: Event) -> Any:
            if (event.who, event.what, event.kind, event.number) == ("source", "sent", "Tokens", 0):
                for _ in range(2):
                    with pytest.raises(ModelError) as refused:
                        world.move("story", options=QUICK)
                    refusals.append(str(refused.value))
            return None

        disturb(world, hook)
        report = world.move("story", options=QUICK)
        assert report is not None and (report.outcome, report.epoch) == ("moved", 2), report
        assert refusals == ["request 'story' is being moved already; wait for the report of that move"] * 2
        world.start()
        assert world.read("story") == whole_text(session())
    assert not migration._moving


def test_a_request_is_not_moved_to_where_it_is() -> None:
    with a_world() as world:
        report = world.move("story", "source", "source", options=QUICK)
        assert report is not None and (report.outcome, report.owner, report.epoch) == ("stayed", "source", 1)
        assert "request 'story' is there already" in report.reason
        world.start()
        assert world.read("story") == whole_text(session())


def test_a_mode_that_there_is_not_is_refused() -> None:
    with a_world() as world:
        for wrong in ("nonsense", None, ["kv"]):
            with pytest.raises(ValueError, match=r"there is no mode .*one of tokens, kv, stop_and_copy or auto"):
                world.move("story", mode=wrong, options=QUICK)
        world.start()
        assert world.read("story") == whole_text(session()) and world.register.owner("story") == ("source", 1)


@pytest.mark.parametrize("name", ["target_gap_tokens", "max_rounds", "block_nbytes"])
def test_counts_of_a_move_are_whole_and_positive(name: str) -> None:
    wrongs: list[Any] = [1.5, 4.0, float("nan"), True, 0, -1, "4", None]
    for wrong in wrongs:
        with pytest.raises(ValueError, match=f"{name} is .*whole number of at least 1"):
            MoveOptions(**{name: wrong})


@pytest.mark.parametrize("name", ["answer_seconds", "stopped_seconds"])
def test_times_of_a_move_are_finite_and_positive(name: str) -> None:
    assert getattr(MoveOptions(**{name: 2}), name) == 2
    wrongs: list[Any] = [float("nan"), float("inf"), 0, -1.0, True, "4", None]
    for wrong in wrongs:
        with pytest.raises(ValueError, match=f"{name} is .*more than 0 and finite"):
            MoveOptions(**{name: wrong})


def test_nobody_at_the_address(tmp_path: Path) -> None:
    with a_world() as world:
        source = world["source"]
        report = migration.migrate(source.engine, "story", tmp_path / "nobody", owner="source", register=source.register, feed=source.feed)
        assert (report.outcome, report.owner, report.epoch) == ("stayed", "source", 1) and "nobody" in report.reason
        with pytest.raises(ModelError, match="ask the register"):
            migration.migrate(source.engine, "story", tmp_path / "nobody", owner="destination", register=source.register, feed=source.feed)
        with pytest.raises(ModelError, match="ask the register"):
            migration.migrate(source.engine, "unknown", tmp_path / "nobody", owner="source", register=source.register, feed=source.feed)
        world.start()
        assert world.read("story") == whole_text(session())


def test_a_request_that_fails_in_its_engine_is_told_to_its_reader() -> None:
    with a_world() as world:
        generation: Any = world["source"].feed._speakers["story"].generation
        generation.error = ModelError("its logits are not finite")
        del world["source"].engine._all["story"]
        world["source"].feed.report_failures()
        with pytest.raises(ModelError, match="not finite"):
            world.read("story")


def test_an_unknown_conversation_is_refused_and_leaves_nothing() -> None:
    """Messages out of their order: the destination ends the conversation or fails it, and holds no guest."""
    state = session().to_bytes()
    begin = (messages.Begin(1, "story"), [state])
    wrong: list[list[tuple[Any, Any]]] = [
        [(messages.Tokens(1, 0, [1]), None)],
        [(messages.Await(1), None)],
        [(messages.Begin(2, "story"), [state])],
        [(messages.Begin(1, "another"), [state])],
        [(messages.Begin(1, "story"), [b"no session"])],
        [begin, (messages.Begin(2, "story"), [state])],
        [begin, (messages.Tokens(2, 5, [1]), None)],
        [begin, (messages.Tokens(4, 0, [1]), None)],
        [begin, (messages.Blocks(2, 0, 2), [bytes(16)])],
        [begin, (messages.HandOver(2, 1, len(state)), [replace(session(), token_ids=(1, 2, 3), prompt_length=3).to_bytes()])],
        [begin, (messages.HandOver(2, 1, 10), [state])],
        [begin, (messages.HandOver(2, 7, len(state)), [state])],
    ]
    for conversation in wrong:
        with World(lambda name: FakeEngine()) as world:
            there = world["destination"]
            ours, theirs = socket.socketpair()
            target = MigrationTarget(Channel(theirs, messages.Request, name="source"), owner="destination", register=there.register, feed=there.feed)
            thread = threading.Thread(target=serve, args=(target, theirs), daemon=True)
            thread.start()
            channel: Channel[Any] = Channel(ours, messages.Answer, name="destination")
            with channel:
                answer: Any = None
                for request, payload in conversation:
                    channel.send(request, payload=payload)
                    try:
                        answer = channel.receive(5).message
                    except WireError:
                        answer = None
                refused = answer is None or isinstance(answer, messages.Failed) or (isinstance(answer, messages.Took) and answer.epoch is None)
                assert refused, (conversation, answer)
            thread.join()
            assert there.engine.guests == there.engine.requests == ()
            assert world.register.owner("story").owner is None


def serve(target: MigrationTarget, sock: socket.socket) -> None:
    try:
        with suppress(WireError):
            target.serve()
    finally:
        sock.close()


# --- real processes, really killed ---------------------------------------------------------------------------------------


KILLS = [
    ("one", "tokens", "sent:Tokens"),
    ("two", "tokens", "sent:Took"),
    pytest.param("one", "kv", "sent:HandOver", marks=pytest.mark.slow),
    pytest.param("one", "kv", "sending:Blocks", marks=pytest.mark.slow),
    pytest.param("two", "tokens", "received:HandOver", marks=pytest.mark.slow),
    pytest.param("two", "kv", "sending:Took", marks=pytest.mark.slow),
    pytest.param("two", "stop_and_copy", "received:Blocks", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("victim", "mode", "where"), KILLS)
def test_a_worker_process_is_killed_at_a_message(monkeypatch: pytest.MonkeyPatch, victim: str, mode: Any, where: str) -> None:
    """SIGKILL to a real process at a message of a move: all requests finish with the right text with whoever is left."""
    monkeypatch.undo()  # moves as they are: the patch of this module is not in the other processes anyway
    if mode != "tokens":
        monkeypatch.setenv("WITH_TORCH", "1")
    with Workers("no checkpoint", program=(fake_engine.__file__, f"{victim}={where}")) as workers:
        stories = {}
        for number, name in enumerate(("one", "one", "two")):
            options = SamplingOptions(seed=number)
            request_id = workers.submit(name, list(range(20, 60)), max_new_tokens=300, sampling=options, stop_at_eos=False)
            stories[request_id] = Session(request_id, "fake", tuple(range(20, 60)), 40, 300, options, stop_at_eos=False)
        moving = next(iter(stories))
        for _ in zip(range(5), workers.ledger.stream(moving, timeout=10), strict=False):
            pass
        try:
            report = workers.move(moving, "two", mode=mode)
            assert victim == "two" and report.owner in ("one", "two"), report
        except WireError:
            assert victim == "one"
        for request_id, story in stories.items():
            pieces = list(workers.ledger.stream(request_id, timeout=10))
            text = "".join(piece.text for piece in pieces)
            assert (tuple(piece.token_id for piece in pieces), text, workers.ledger.finish(request_id)) == whole_text(story)
        assert workers.names == ({"one": "two", "two": "one"}[victim],)
        assert {workers.register.owner(request_id).owner for request_id in stories} == set(workers.names)


def test_a_worker_without_survivors_fails_its_requests_and_its_name_is_spent() -> None:
    with Workers("no checkpoint", names=("one",), program=(fake_engine.__file__,)) as workers:
        story = workers.submit("one", [1, 2, 3], max_new_tokens=10_000, stop_at_eos=False)
        for _ in zip(range(3), workers.ledger.stream(story, timeout=10), strict=False):
            pass
        workers.kill("one")
        with pytest.raises(ModelError, match="every worker has died"):
            for _ in workers.ledger.stream(story, timeout=10):
                pass
        with pytest.raises(WireError, match=r"worker 'one' has died.*none, so start another"):
            workers.submit("one", [1, 2, 3])


def test_workers_cancel_and_refuse() -> None:
    with Workers("no checkpoint", names=("one",), program=(fake_engine.__file__,)) as workers:
        story = workers.submit("one", "abc", max_new_tokens=10_000, stop_at_eos=False)
        next(workers.ledger.stream(story, timeout=10))
        workers.cancel(story)
        list(workers.ledger.stream(story, timeout=10))
        assert workers.ledger.finish(story) == "cancelled"
        with pytest.raises(ModelError, match=r"cannot be moved: its text has ended \(cancelled\)"):
            workers.move(story, "two")
        with pytest.raises(ModelError, match="nobody's"):
            workers.move("unknown", "one")
        with pytest.raises(ValueError, match="in the ledger already"):
            workers.submit("one", "abc", request_id=story)
