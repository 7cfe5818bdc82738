"""Who owns a request, and what its client has been told: the register of epochs and the token ledger. Chapter 07."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from fake_engine import FakeEngine, whole_text

from sllm_mini.errors import ModelError, WireError
from sllm_mini.inference.ownership import server
from sllm_mini.inference.ownership.feed import TokenFeed
from sllm_mini.inference.ownership.ledger import MAX_RESTARTS, TokenLedger
from sllm_mini.inference.ownership.messages import MAX_TOKENS, Answer, Owner, Request, Token
from sllm_mini.inference.ownership.register import EpochRegister
from sllm_mini.inference.ownership.server import OwnershipClient, OwnershipServer
from sllm_mini.inference.sampler import SamplingOptions
from sllm_mini.inference.session import Session
from sllm_mini.types import Epoch
from sllm_mini.wire import Channel, Connections, connect


def story(request_id: str = "story", max_new_tokens: int = 30) -> Session:
    return Session(request_id, "fake", (7, 8, 9), 3, max_new_tokens, SamplingOptions(seed=5), stop_at_eos=False)


def token(position: int, *, epoch: int = 1, token_id: int = 1, text: str = "x", finish: Any = None, request_id: str = "story") -> Token:
    return Token(request_id, epoch, position, token_id, text, finish)


@pytest.fixture
def both() -> tuple[EpochRegister, TokenLedger]:
    register = EpochRegister()
    ledger = TokenLedger(register)
    ledger.open(story())
    assert register.claim("story", "one", 0) == 1
    return register, ledger


@pytest.fixture(params=["in memory", "over a socket"])
def asked(request: pytest.FixtureRequest, both: tuple[EpochRegister, TokenLedger], tmp_path: Path) -> Iterator[Any]:
    """The register and the ledger, as this process has them and as another one asks them."""
    register, ledger = both
    if request.param == "in memory":
        yield type("Both", (), {"owner": register.owner, "claim": register.claim, "release": register.release, "deliver": ledger.deliver, "give_up": ledger.give_up})
        return
    with OwnershipServer(register, ledger, tmp_path / "arbiter") as arbiter, OwnershipClient(arbiter.address) as client:
        yield client


# --- the register -------------------------------------------------------------------------------------------------------


def test_a_claim_is_a_compare_and_set(asked: Any) -> None:
    assert asked.owner("story") == ("one", 1) and asked.owner("unknown") == (None, 0)
    assert asked.claim("story", "two", 0) is None and asked.claim("story", "two", 2) is None
    assert asked.claim("story", "two", 1) == 2 and asked.owner("story") == ("two", 2)
    assert asked.claim("story", "one", 1) is None
    assert not asked.release("story", "one", 2) and not asked.release("story", "two", 1)
    assert asked.release("story", "two", 2) and asked.owner("story") == (None, 2)
    assert asked.claim("story", "one", 2) == 3


def test_a_claim_is_repeated_by_its_ticket_and_not_by_its_name(both: tuple[EpochRegister, TokenLedger]) -> None:
    register, _ = both
    assert register.claim("story", "two", 1, ticket=77) == 2
    assert register.claim("story", "two", 1, ticket=77) == 2, "its answer may have been lost"
    assert register.claim("story", "two", 1, ticket=78) is None and register.claim("story", "two", 1) is None
    assert register.claim("story", "one", 2, ticket=1) == 3
    assert register.claim("story", "two", 1, ticket=77) is None, "it is long over"


def test_of_many_that_claim_one_epoch_one_wins(asked: Any) -> None:
    won: list[str] = []

    def claim(name: str) -> None:
        for epoch in range(1, 20):
            if asked.claim("story", name, epoch) is not None:
                won.append(name)

    threads = [threading.Thread(target=claim, args=(f"w{number}",)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == asked.owner("story").epoch - 1


def test_the_dead_claim_nothing(both: tuple[EpochRegister, TokenLedger]) -> None:
    register, _ = both
    register.claim("another", "one", 0)
    register.claim("third", "two", 0)
    assert register.retire("one") == {"story": 1, "another": 1}
    assert register.claim("third", "one", 1) is None and register.owner("story") == ("one", 1)
    assert register.claim("story", "two", 1) == 2
    register.forget("story")
    assert register.owner("story") == (None, 0) and register.retire("two") == {"third": 1}


# --- the ledger ---------------------------------------------------------------------------------------------------------


def test_the_ledger_takes_the_next_token_of_the_owner_and_no_other(asked: Any, both: tuple[EpochRegister, TokenLedger]) -> None:
    _, ledger = both
    says = [
        (token(4), "refused"),  # a gap
        (token(3), "taken"),
        (token(3), "had"),
        (token(3, token_id=2), "refused"),
        (token(3, text="y"), "refused"),
        (token(2), "refused"),  # the prompt
        (token(4, epoch=0), "stale"),
        (token(4, epoch=2), "stale"),
        (token(4, request_id="unknown"), "stale"),
        (token(4, text="", finish="stop"), "taken"),
        (token(4, text="", finish="stop"), "had"),
        (token(4, text=""), "refused"),
        (token(5), "refused"),  # after the end
    ]
    assert asked.deliver([one for one, _ in says]) == [verdict for _, verdict in says]
    assert [piece.text for piece in ledger.stream("story")] == ["x", ""] and ledger.finish("story") == "stop"
    many = [token(3)] * (2 * MAX_TOKENS + 1)
    assert asked.deliver(many) == ["had"] * len(many)


def test_whatever_order_and_epoch_tokens_come_in_the_stream_has_each_once() -> None:
    """Two owners who both think that the request is theirs send everything, twice, shuffled; some of it is wrong."""
    new_ids, text, finish = whole_text(story())
    for seed in range(60):
        rng = random.Random(seed)
        register = EpochRegister()
        ledger = TokenLedger(register)
        ledger.open(story())
        register.claim("story", "one", 0)
        pieces: list[Any] = []
        engine = FakeEngine()
        engine.adopt(story(), on_piece=pieces.append)
        while engine.step():
            pass
        change = rng.randrange(len(pieces))
        while ledger.finish("story") is None:
            taken = len(ledger.pieces("story"))
            if taken == change and register.owner("story").epoch == 1:
                register.claim("story", "two", 1)
            number = min(max(taken + rng.randint(-3, 2), 0), len(pieces) - 1)
            piece, wrong = pieces[number], rng.random() < 0.1
            last: Any = finish if number == len(pieces) - 1 else None
            said = Token("story", rng.choice([1, 2]), piece.position, piece.token_id + wrong, piece.text, last)
            verdict = ledger.accept(said)
            right = said.epoch == (1 if taken < change else 2)
            assert (verdict == "stale") == (not right)
            if right:
                if number == taken and wrong:
                    break  # an owner that says something wrong is believed: it is the owner
                assert verdict == ("taken" if number == taken else "had" if number < taken and not wrong else "refused")
        else:
            assert tuple(piece.token_id for piece in ledger.stream("story")) == new_ids
            assert "".join(piece.text for piece in ledger.stream("story")) == text


def test_a_request_begins_again_from_any_token(both: tuple[EpochRegister, TokenLedger]) -> None:
    expected = whole_text(story())
    for many in range(30):
        register = EpochRegister()
        ledger = TokenLedger(register)
        ledger.open(story())
        register.claim("story", "one", 0)
        engines = FakeEngine(), FakeEngine()
        with TokenFeed(engines[0], ledger) as feed:  # type: ignore[arg-type]
            feed.adopt(story(), Epoch(1))
            for _ in range(many):
                engines[0].step()
        begun = ledger.restart("story", "two", 1)
        assert begun is not None and begun[1] == 2 and len(begun[0].new_ids) == many and begun[0].held_text == (None if many else "")
        with TokenFeed(engines[1], ledger) as feed:  # type: ignore[arg-type]
            feed.adopt(*begun)
            while engines[1].step():
                pass
        pieces = list(ledger.stream("story"))
        assert (tuple(piece.token_id for piece in pieces), "".join(piece.text for piece in pieces), ledger.finish("story")) == expected
        assert [piece.epoch for piece in pieces] == [1] * many + [2] * (30 - many)
        assert ledger.restart("story", "three", 1) is None and ledger.restart("story", "three", 2) is None, "its text has ended"


def test_a_request_that_never_gets_on_is_begun_again_a_few_times_only(both: tuple[EpochRegister, TokenLedger]) -> None:
    register, ledger = both
    for position in range(3, 6):  # a token in between, and the count begins anew
        for _ in range(MAX_RESTARTS):
            epoch = register.owner("story").epoch
            assert ledger.restart("story", "another", epoch) is not None
            assert ledger.restart("story", "third", epoch) is None, "who comes too late counts for nothing"
        assert ledger.accept(token(position, epoch=register.owner("story").epoch)) == "taken"
    for _ in range(MAX_RESTARTS):
        assert ledger.restart("story", "another", register.owner("story").epoch) is not None
    assert ledger.restart("story", "another", register.owner("story").epoch) is None
    with pytest.raises(ModelError, match="begun again 2 times and gave no token"):
        list(ledger.stream("story"))


def test_a_closed_request_is_not_begun_again(both: tuple[EpochRegister, TokenLedger]) -> None:
    register, ledger = both
    ledger.close("story")
    assert ledger.restart("story", "two", 0) is None and register.owner("story") == (None, 0)


def test_streams_wait_and_end_and_say_why(both: tuple[EpochRegister, TokenLedger]) -> None:
    register, ledger = both
    with pytest.raises(TimeoutError, match="its owner is one"):
        next(ledger.stream("story", timeout=0.01))
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.extend(piece.text for piece in ledger.stream("story")))
    reader.start()
    ledger.accept(token(3, text="a"))
    ledger.accept(token(4, text="b"))
    ledger.end("story")
    reader.join()
    assert read == ["a", "b"] and ledger.finish("story") == "cancelled" and ledger.accept(token(5)) == "refused"
    with pytest.raises(ValueError, match="in the ledger already"):
        ledger.open(story())
    ledger.close("story")
    assert register.owner("story") == (None, 0)
    for ask in (ledger.pieces, ledger.finish, ledger.session, ledger.end, lambda name: next(ledger.stream(name))):
        with pytest.raises(ModelError, match="never opened, or was closed"):
            ask("story")


def test_an_owner_gives_up_for_itself_alone(asked: Any, both: tuple[EpochRegister, TokenLedger]) -> None:
    _, ledger = both
    ledger.accept(token(3))
    assert not asked.give_up("story", 0, "no") and not asked.give_up("unknown", 1, "no")
    assert asked.give_up("story", 1, "its logits are not finite")
    stream = ledger.stream("story")
    assert next(stream).text == "x"
    with pytest.raises(ModelError, match="given up: its logits are not finite"):
        next(stream)


# --- over the socket, and from an engine ----------------------------------------------------------------------------------


def test_an_arbiter_that_goes_is_an_error_and_one_that_comes_back_is_found(both: tuple[EpochRegister, TokenLedger], tmp_path: Path) -> None:
    register, ledger = both
    address = tmp_path / "arbiter"
    with OwnershipClient(address) as client:
        with pytest.raises(WireError, match="no server answers"):
            client.owner("story")
        for _ in range(2):
            with OwnershipServer(register, ledger, address):
                assert client.owner("story").owner == "one"
        with pytest.raises(WireError):
            client.claim("story", "two", 1)
    assert register.owner("story").epoch == 1


def test_a_claim_whose_answer_is_lost_is_made_once(both: tuple[EpochRegister, TokenLedger], tmp_path: Path) -> None:
    register, ledger = both
    with OwnershipServer(register, ledger, tmp_path / "arbiter") as arbiter:
        answered: list[int] = []
        honest = OwnershipServer._answer

        def losing(request: Any) -> Any:
            answer = honest(arbiter, request)
            answered.append(1)
            if len(answered) == 1:
                raise WireError("the answer is lost, with the connection")
            return answer

        arbiter._answer = losing  # type: ignore[method-assign]
        with OwnershipClient(arbiter.address) as client:
            assert client.claim("story", "two", 1) == 2
        assert len(answered) == 2 and register.owner("story") == ("two", 2)


def test_an_arbiter_that_is_silent_is_asked_a_fixed_number_of_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "ANSWER_SECONDS", 0.1)
    heard: list[object] = []

    def talk(channel: Channel[Owner]) -> None:
        while True:
            heard.append(channel.receive().message)

    connections: Connections[Owner] = Connections(tmp_path / "socket", Request, talk, name="silent")
    with OwnershipClient(connections.address) as client, pytest.raises(WireError, match="in time"):
        client.owner("story")
    connections.close()
    assert heard == [Owner("story")] * server.TRIES


def test_a_client_that_talks_nonsense_is_hung_up_on_and_the_others_are_served(both: tuple[EpochRegister, TokenLedger], tmp_path: Path) -> None:
    register, ledger = both
    with OwnershipServer(register, ledger, tmp_path / "arbiter") as arbiter, OwnershipClient(arbiter.address) as client:
        with connect(arbiter.address) as sock:
            sock.sendall(b"GET / HTTP/1.1\r\n\r\n\r\n\r\n")
            with suppress(ConnectionResetError):  # closed, with some of it unread
                assert sock.recv(10) == b""
        assert client.owner("story").owner == "one"


def test_connections_close_with_talks_under_way(tmp_path: Path) -> None:
    begun = threading.Event()

    def talk(channel: Channel[Owner]) -> None:
        begun.set()
        channel.receive()

    connections: Connections[Owner] = Connections(tmp_path / "socket", Request, talk, name="test")
    with Channel(connect(connections.address), Answer, name="test"):
        assert begun.wait(5)
        connections.close()
    assert not (tmp_path / "socket").exists()


def test_a_feed_whose_ledger_is_gone_drops_everything() -> None:
    class Gone:
        def deliver(self, tokens: Any) -> Any:
            raise WireError("the router is gone")

        def give_up(self, request_id: str, epoch: int, reason: str) -> bool:
            raise WireError("the router is gone")

    engine = FakeEngine()
    with TokenFeed(engine, Gone()) as feed:  # type: ignore[arg-type]
        feed.adopt(story("a"), Epoch(1))
        feed.adopt(story("b"), Epoch(1))
        assert feed.error is None
        engine.step()
        with pytest.raises(WireError, match="router is gone"):
            feed.flush("a", 5)
        assert "router is gone" in str(feed.error)
    assert engine.requests == ()
    with TokenFeed(engine, Gone()) as feed:  # type: ignore[arg-type]
        feed.adopt(story("c"), Epoch(1))
        engine.drop("c")  # its engine ended it, and that cannot be told either
        feed.report_failures()
        assert "router is gone" in str(feed.error)


def test_an_order_that_was_overtaken_is_refused(both: tuple[EpochRegister, TokenLedger]) -> None:
    register, ledger = both
    early, late = ledger.restart("story", "two", 1), ledger.restart("story", "two", 2)
    assert early is not None and late is not None
    engine = FakeEngine()
    with TokenFeed(engine, ledger) as feed:  # type: ignore[arg-type]
        feed.adopt(*late)
        with pytest.raises(ModelError, match="epoch 3 already"):
            feed.adopt(*early)
        while engine.step():
            pass
    assert ledger.finish("story") == "length" and register.owner("story") == ("two", 3)


def test_a_request_that_begins_again_meanwhile_is_no_failure(both: tuple[EpochRegister, TokenLedger], monkeypatch: pytest.MonkeyPatch) -> None:
    """It was away when the running ones were counted, and is back when its end would be told."""
    _, ledger = both
    engine = FakeEngine()
    with TokenFeed(engine, ledger) as feed:  # type: ignore[arg-type]
        feed.adopt(story(), Epoch(1))
        looks = iter([()])
        with monkeypatch.context() as patch:
            patch.setattr(FakeEngine, "requests", property(lambda self: next(looks, tuple(self._all))))
            feed.report_failures()
        assert feed.epoch("story") == 1
        while engine.step():
            pass
    assert ledger.finish("story") == "length" and len(list(ledger.stream("story"))) == 30


class _Counting:
    """A ledger that tells how many tokens came in each message."""

    def __init__(self, ledger: TokenLedger) -> None:
        self.ledger, self.counts = ledger, list[int]()
        self.come = threading.Condition()

    def deliver(self, tokens: Any) -> Any:
        verdicts = self.ledger.deliver(tokens)
        with self.come:
            self.counts.append(len(tokens))
            self.come.notify_all()
        return verdicts

    def give_up(self, request_id: str, epoch: int, reason: str) -> bool:
        return self.ledger.give_up(request_id, epoch, reason)

    def wait(self, count: int) -> None:
        with self.come:
            assert self.come.wait_for(lambda: sum(self.counts) >= count, 10)


def test_tokens_between_the_first_and_the_last_go_together(both: tuple[EpochRegister, TokenLedger]) -> None:
    engine, ledger = FakeEngine(), _Counting(both[1])
    with TokenFeed(engine, ledger, interval_seconds=3600.0) as feed:  # type: ignore[arg-type]
        feed.adopt(story(), Epoch(1))
        engine.step()
        ledger.wait(1)  # the first waits for nobody
        for _ in range(9):
            engine.step()
        assert ledger.counts == [1]
        feed.flush("story", 10)  # nor does a move
        assert ledger.counts == [1, 9]
        while engine.step():
            pass
        ledger.wait(30)  # nor the last
        assert ledger.counts == [1, 9, 20]
    assert [piece.position for piece in both[1].stream("story")] == list(range(3, 33))


def test_tokens_that_gathered_go_after_the_interval_and_at_the_end(both: tuple[EpochRegister, TokenLedger]) -> None:
    engine, ledger = FakeEngine(), _Counting(both[1])
    with TokenFeed(engine, ledger, interval_seconds=0.01) as feed:  # type: ignore[arg-type]
        feed.adopt(story(), Epoch(1))
        for count in (1, 4, 5):
            while sum(ledger.counts) + len(feed._waiting) + len(feed._sending) < count:
                engine.step()
            ledger.wait(count)
    with TokenFeed(engine, ledger, interval_seconds=3600.0) as feed:  # type: ignore[arg-type]
        pass  # closed with nothing in it: it does not wait for the interval
