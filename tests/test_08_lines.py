"""Requests that come to their owner over a line: taken there, or brought the other way, and never neither. Chapter 08."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_engine import FakeEngine, whole_text
from processes import PATIENCE
from store_process import eventually

from sllm_mini.cluster.nodes.threads import ThreadLauncher
from sllm_mini.cluster.nodes.worker_messages import ClimbRung
from sllm_mini.errors import ModelError
from sllm_mini.inference.ownership import EpochRegister, Line, Lines, OwnershipServer, TokenLedger
from sllm_mini.inference.ownership.lines import MAX_NBYTES
from sllm_mini.inference.sampler import SamplingOptions
from sllm_mini.inference.session import Session
from sllm_mini.inference.workers.service import EngineService
from sllm_mini.types import Warmth
from sllm_mini.wire import WireTimeout

Run = Callable[[Session, int], object]


class Driver:
    """Whoever decides: the register, the ledger and the lines, and what went the other way."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.register, self.lines = folder, EpochRegister(), Lines()
        self.ledger = TokenLedger(self.register)
        self.server = OwnershipServer(self.register, self.ledger, folder / "arbiter", self.lines)
        self.other_way: list[str] = []

    def called(self, *owners: str) -> None:
        eventually(lambda: set(self.lines._lines) == set(owners), PATIENCE)

    def give(self, owner: str, session: Session, epoch: int = 1) -> None:
        self.lines.give(owner, epoch, session.to_bytes(), lambda: self.other_way.append(session.request_id))

    def begin(self, owner: str, name: str, *, max_new_tokens: int = 12) -> Session:
        session = a_session(name, max_new_tokens=max_new_tokens)
        self.ledger.open(session)
        epoch = self.register.claim(name, owner, 0)
        assert epoch is not None
        self.give(owner, session, epoch)
        return session

    def told(self, session: Session) -> tuple[tuple[int, ...], str, str | None]:
        pieces = list(self.ledger.stream(session.request_id, timeout=PATIENCE))
        return tuple(piece.token_id for piece in pieces), "".join(piece.text for piece in pieces), self.ledger.finish(session.request_id)


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[Driver]:
    found = Driver(tmp_path)
    with found.server:
        yield found


def a_session(name: str, ntokens: int = 3, *, max_new_tokens: int = 12) -> Session:
    return Session(name, "fake", tuple(range(1, ntokens + 1)), ntokens, max_new_tokens, SamplingOptions(), (), stop_at_eos=False)


def line(driver: Driver, run: Run, owner: str = "one") -> Line:
    made = Line(driver.server.address, owner, run)
    driver.called(owner)
    return made


def test_requests_come_in_order_and_once(driver: Driver) -> None:
    come: list[tuple[str, int]] = []
    mine = line(driver, lambda session, epoch: come.append((session.request_id, epoch)))
    for number in range(200):
        driver.give("one", a_session(f"r{number}"), number)
    eventually(lambda: len(come) + len(driver.other_way) == 200, PATIENCE)  # a line that is full takes none for a moment
    assert come == [(f"r{number}", number) for number in range(200) if f"r{number}" not in driver.other_way]
    mine.close()
    driver.called()
    driver.give("one", a_session("late"))
    assert driver.other_way[-1] == "late" and len(come) + len(driver.other_way) == 201


def test_what_a_line_does_not_take_goes_the_other_way(driver: Driver) -> None:
    def refusing(session: Session, epoch: int) -> None:
        raise ModelError("it has another model")

    driver.give("one", a_session("before"))
    assert driver.other_way == ["before"], "nobody has called"
    mine = line(driver, refusing)
    driver.give("two", a_session("for another"))
    driver.give("one", a_session("long", MAX_NBYTES))
    assert driver.other_way == ["before", "for another", "long"]
    driver.give("one", a_session("refused"))
    eventually(lambda: driver.other_way[3:] == ["refused"], PATIENCE)
    driver.give("one", a_session("refused too"))
    eventually(lambda: driver.other_way[4:] == ["refused too"], PATIENCE)  # the line lives
    mine.close()


def test_a_line_that_is_full_makes_nobody_wait(driver: Driver) -> None:
    gate, come = threading.Event(), list[str]()

    def slow(session: Session, epoch: int) -> None:
        gate.wait(PATIENCE)
        come.append(session.request_id)

    mine = line(driver, slow)
    names = [f"r{number}" for number in range(100)]
    for name in names:
        driver.give("one", a_session(name, 5_000))
    assert 0 < len(driver.other_way) < 100
    gate.set()
    eventually(lambda: len(come) + len(driver.other_way) == len(names), PATIENCE)
    assert sorted(come + driver.other_way) == sorted(names)
    driver.give("one", a_session("later", 5_000))
    eventually(lambda: come[-1] == "later", PATIENCE)  # it was full, and lives
    mine.close()


def test_a_reader_that_takes_nothing_makes_nobody_wait(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise WireTimeout("it was not taken in time", ended=False)

    mine = line(driver, lambda session, epoch: None)
    monkeypatch.setattr(driver.lines._lines["one"]._channel, "send", full)
    driver.give("one", a_session("r"))
    assert driver.other_way == ["r"]
    mine.close()
    driver.called()
    assert driver.other_way == ["r"]


@pytest.mark.parametrize("seed", range(5))
def test_whenever_a_line_ends_each_request_is_taken_or_goes_the_other_way(driver: Driver, seed: int) -> None:
    rng, come, names = random.Random(seed), list[str](), list[str]()
    for round_ in range(8):
        mine = line(driver, lambda session, epoch: come.append(session.request_id))
        ending = threading.Timer(rng.random() * 0.02, mine.cut)
        ending.start()
        for number in range(rng.randrange(1, 200)):
            names.append(f"{round_}.{number}")
            driver.give("one", a_session(names[-1]))
        ending.join()
        mine.close()
        driver.called()
    eventually(lambda: {*come, *driver.other_way} == {*names}, PATIENCE)
    assert len(set(come)) == len(come) and len(set(driver.other_way)) == len(driver.other_way)


def test_one_that_calls_again_has_its_last_line(driver: Driver) -> None:
    first, second = list[str](), list[str]()
    one = line(driver, lambda session, epoch: first.append(session.request_id))
    before = driver.lines._lines["one"]
    two = Line(driver.server.address, "one", lambda session, epoch: second.append(session.request_id))
    eventually(lambda: driver.lines._lines["one"] is not before, PATIENCE)
    one.close()
    driver.give("one", a_session("r"))
    eventually(lambda: second == ["r"], PATIENCE)
    two.close()
    assert first == [] and driver.other_way == []


def test_an_arbiter_without_lines_hangs_up_and_nothing_else_ends(tmp_path: Path) -> None:
    register = EpochRegister()
    with OwnershipServer(register, TokenLedger(register), tmp_path / "arbiter") as server:
        called = Line(server.address, "one", lambda session, epoch: None)
        called._thread.join(PATIENCE)
        assert not called._thread.is_alive()
        called.close()
    nobody = Line(tmp_path / "nobody", "one", lambda session, epoch: None)
    nobody.close()
    nobody.close()


def test_a_worker_takes_requests_over_its_line_while_it_serves(driver: Driver, tmp_path: Path) -> None:
    launcher = ThreadLauncher(None, engine="fake_engine:make")
    worker = launcher.launch("w", lambda why: None)
    for warmth in (Warmth.RUNTIME, Warmth.DRAM, Warmth.DEVICE, Warmth.READY):
        worker.climb(ClimbRung(warmth, "tiny", owner="one", address=str(tmp_path / "moves"), arbiter=driver.server.address))
    driver.called("one")
    assert driver.told(session := driver.begin("one", "story")) == whole_text(session) and driver.other_way == []
    worker.fall(Warmth.DEVICE)
    driver.called()
    driver.begin("one", "after")
    assert driver.other_way == ["after"]
    launcher.close()


@pytest.fixture
def serving(driver: Driver, tmp_path: Path) -> Iterator[EngineService]:
    made = EngineService(FakeEngine(step_seconds=0.001), owner="one", address=tmp_path / "moves", arbiter=driver.server.address, on_error=pytest.fail, line=True)  # type: ignore[arg-type]
    driver.called("one")
    yield made
    made.close()


def test_a_request_that_is_told_twice_in_one_epoch_begins_once(driver: Driver, serving: EngineService) -> None:
    session = driver.begin("one", "story", max_new_tokens=200)
    next(iter(driver.ledger.stream("story", timeout=PATIENCE)))
    with serving.engine.between_steps():
        (before,) = [serving.engine.session(name).token_ids for name in serving.engine.requests]
        serving.run(session, 1)  # as by way of its agent, when the line had ended before it answered
        assert serving.engine.session("story").token_ids == before
    assert driver.told(session) == whole_text(session)


def test_an_order_to_drop_a_request_that_has_begun_again_since_is_over(driver: Driver, serving: EngineService) -> None:
    session = driver.begin("one", "story", max_new_tokens=100)
    next(iter(driver.ledger.stream("story", timeout=PATIENCE)))
    assert driver.register.claim("story", "router", 1) == 2 and driver.register.claim("story", "one", 2) == 3
    driver.give("one", driver.ledger.session("story"), 3)
    eventually(lambda: serving._feed.epoch("story") == 3, PATIENCE)
    serving.drop("story", 1)
    assert driver.told(session) == whole_text(session)


def test_a_service_that_is_cut_off_takes_no_more(driver: Driver, serving: EngineService) -> None:
    serving.cut()
    driver.called()
    driver.begin("one", "story")
    assert driver.other_way == ["story"] and serving.engine.requests == ()
