"""Workers that die, hang or fail in ways of their own, and what their parent does about it. Chapter 07.

The engines are doubles in real processes (`fake_engine`), each made by a few lines of a test, so the right text is known.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_engine
import pytest
from fake_engine import whole_text
from store_process import eventually

from sllm_mini.errors import ModelError, WireError
from sllm_mini.inference.migration import Speeds
from sllm_mini.inference.ownership.messages import Token
from sllm_mini.inference.sampler import SamplingOptions
from sllm_mini.inference.session import Session
from sllm_mini.inference.workers import WorkerOptions, Workers
from sllm_mini.inference.workers.messages import Done, Drop
from sllm_mini.types import Epoch
from sllm_mini.wire import ChannelClosed

FAKE = (fake_engine.__file__,)
Program = Callable[[str], tuple[str]]


@pytest.fixture
def program(tmp_path: Path) -> Program:
    """A worker's program whose `make(begin)` changes the double `engine`, as the given lines say."""

    def write(lines: str) -> tuple[str]:
        path = tmp_path / "program.py"
        path.write_text(
            f"import sys, os, time\nsys.path.insert(0, {str(Path(fake_engine.__file__).parent)!r})\n"
            "import fake_engine\nfrom sllm_mini.errors import ModelError\nfrom sllm_mini.inference.workers import worker\n\n"
            f"def make(begin):\n    engine = fake_engine.make(begin)\n{textwrap.indent(textwrap.dedent(lines), '    ')}\n    return engine\n\nworker.main(make)\n"
        )
        return (str(path),)

    return write


def told(workers: Workers, name: str, prompt: list[int], *, max_new_tokens: int = 300, tokens: int = 1) -> str:
    """The id of a request that has given that many tokens."""
    request_id = workers.submit(name, prompt, max_new_tokens=max_new_tokens, stop_at_eos=False)
    for _ in zip(range(tokens), workers.ledger.stream(request_id, timeout=20), strict=False):
        pass
    return request_id


def check_whole(workers: Workers, request_id: str, prompt: list[int], max_new_tokens: int = 300) -> None:
    pieces = list(workers.ledger.stream(request_id, timeout=20))
    story = Session(request_id, "fake", tuple(prompt), len(prompt), max_new_tokens, SamplingOptions(), stop_at_eos=False)
    text = "".join(piece.text for piece in pieces)
    assert (tuple(piece.token_id for piece in pieces), text, workers.ledger.finish(request_id)) == whole_text(story)


# --- hanging ----------------------------------------------------------------------------------------------------------


def test_an_owner_that_hangs_is_killed_and_its_requests_begin_again() -> None:
    """SIGSTOP: the process keeps its connections and says nothing."""
    with Workers("no checkpoint", options=WorkerOptions(silent_seconds=4.0), program=FAKE) as workers:
        story = told(workers, "one", [1, 2, 3])
        process = workers._workers["one"].process
        os.kill(process.pid, signal.SIGSTOP)
        check_whole(workers, story, [1, 2, 3])
        assert workers.names == ("two",) and workers.register.owner(story) == ("two", 2) and process.returncode == -signal.SIGKILL


def test_a_worker_with_a_long_order_in_its_hands_is_not_silent(program: Program) -> None:
    slow = program("adopt = engine.adopt\nengine.adopt = lambda *a, **k: (time.sleep(3.5), adopt(*a, **k))[1]")
    with Workers("no checkpoint", ["one"], options=WorkerOptions(silent_seconds=2.5), program=slow) as workers:
        check_whole(workers, told(workers, "one", [1, 2, 3], max_new_tokens=20), [1, 2, 3], 20)
        assert workers.names == ("one",)


def test_options_that_run_nothing_are_refused() -> None:
    nan = float("nan")
    for wrong in ({"threads": 0}, {"threads": 1.5}, {"max_batch": 0}, {"max_batch": nan}, {"pace_seconds": -1.0}, {"pace_seconds": nan}, {"silent_seconds": 0.0}):
        with pytest.raises(ValueError, match="runs nothing"):
            WorkerOptions(**wrong)


def test_a_worker_whose_ledger_is_silent_ends_and_its_requests_begin_again(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    hasty = program("from sllm_mini.inference.ownership import server\nif begin.owner == 'one':\n    server.ANSWER_SECONDS = 0.3")
    with Workers("no checkpoint", program=hasty) as workers:
        deliver = workers.ledger.deliver

        def stalled(tokens: Any) -> Any:
            if any(token.epoch == 1 and token.position > 10 for token in tokens):
                eventually(lambda: "one" not in workers.names)
            return deliver(tokens)

        monkeypatch.setattr(workers.ledger, "deliver", stalled)
        check_whole(workers, told(workers, "one", [1, 2, 3]), [1, 2, 3])
        assert workers.names == ("two",)


# --- burials ------------------------------------------------------------------------------------------------------------


def test_a_request_that_is_closed_or_fails_stops_no_burial(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of five requests of a dead worker one is closed while the others begin again, one is refused, one breaks its order."""
    with Workers("no checkpoint", program=FAKE) as workers:
        first, closed, refused, broken, last = (told(workers, "one", [1, 2, number]) for number in range(5))
        run = workers._run

        def interfering(name: str, session: Session, epoch: Epoch) -> None:
            if session.request_id == first:
                workers.ledger.close(closed)
            if session.request_id == refused:
                raise ModelError("no slot is left")
            if session.request_id == broken:
                raise RuntimeError("a fault of the parent's own")
            run(name, session, epoch)

        monkeypatch.setattr(workers, "_run", interfering)
        workers.kill("one")
        check_whole(workers, first, [1, 2, 0])
        check_whole(workers, last, [1, 2, 4])
        for request_id, why in ((refused, "no slot is left"), (broken, "fault of the parent")):
            with pytest.raises(ModelError, match=why):
                list(workers.ledger.stream(request_id, timeout=10))
        assert workers.register.owner(closed) == (None, 0), "a closed request leaves nothing at the register"


def test_a_second_burial_takes_no_request_from_its_heir() -> None:
    with Workers("no checkpoint", ["one", "two", "three"], program=FAKE) as workers:
        story = told(workers, "one", [1, 2, 3], max_new_tokens=600)
        workers.kill("one")
        eventually(lambda: workers.register.owner(story).epoch == 2)
        heir = workers.register.owner(story)
        for number in range(3):
            workers._begin_again(story, Epoch(1), number)
        assert workers.register.owner(story) == heir
        check_whole(workers, story, [1, 2, 3], 600)


def test_a_request_that_kills_its_workers_does_not_go_through_all_of_them(program: Program) -> None:
    poison = program("step = engine.step\nengine.step = lambda: 1 / 0 if 'poison' in engine.requests else step()")
    with Workers("no checkpoint", ["one", "two", "three", "four"], program=poison) as workers:
        workers.submit("one", [1, 2, 3], max_new_tokens=20, request_id="poison")
        with pytest.raises(ModelError, match="begun again 2 times"):
            list(workers.ledger.stream("poison", timeout=20))
        eventually(lambda: len(workers.names) == 1)
        check_whole(workers, told(workers, workers.names[0], [1, 2, 3]), [1, 2, 3])


def test_an_order_to_a_dead_worker_fails_once_its_death_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sender may notice the end of the connection first; whoever gave the order looks next whether the worker is gone."""
    with Workers("no checkpoint", ["one"], program=FAKE) as workers:
        worker = workers._workers["one"]

        def broken(*_: Any, **__: Any) -> None:
            worker.kill()
            raise ChannelClosed("the peer closed the channel")

        monkeypatch.setattr(worker._channel, "send", broken)
        with pytest.raises(WireError, match="worker one is gone"):
            worker.ask(Drop(worker.next(), "nothing", 1), Done)
        assert worker.gone


# --- errors of an engine -------------------------------------------------------------------------------------------------


def test_any_error_in_a_move_is_answered_and_the_text_goes_on(program: Program) -> None:
    out_of_memory = program("def boom(*a): raise RuntimeError('out of memory')\nengine.read_kv = boom")
    with Workers("no checkpoint", program=out_of_memory) as workers:
        story = told(workers, "one", [1, 2, 3], max_new_tokens=1000)
        with pytest.raises(ModelError, match="out of memory"):
            workers.move(story, "two", mode="kv")
        check_whole(workers, story, [1, 2, 3], 1000)
        assert workers.names == ("one", "two") or workers.names == ("two", "one")


@pytest.mark.parametrize("error", ["RuntimeError", "ModelError"])
def test_a_request_that_its_engine_refuses_is_forgotten(program: Program, error: str) -> None:
    refusing = program(f"adopt = engine.adopt\ndef picky(session, **k):\n    if session.request_id == 'large': raise {error}('too large')\n    return adopt(session, **k)\nengine.adopt = picky")
    with Workers("no checkpoint", ["one"], program=refusing) as workers:
        with pytest.raises(ModelError, match="too large"):
            workers.submit("one", [1, 2, 3], request_id="large")
        with pytest.raises(ModelError, match="never opened, or was closed"):
            workers.ledger.pieces("large")
        assert workers.register.owner("large") == (None, 0)
        check_whole(workers, told(workers, "one", [1, 2, 3], max_new_tokens=20), [1, 2, 3], 20)


def test_an_answer_that_cannot_be_sent_is_an_error_and_no_death(program: Program) -> None:
    with Workers("no checkpoint", ["one"], program=program("engine.encode = lambda prompt: [-1]")) as workers:
        with pytest.raises(WireError, match="breaks its own schema"):
            workers.submit("one", "abc")
        check_whole(workers, told(workers, "one", [1, 2, 3], max_new_tokens=20), [1, 2, 3], 20)


# --- names, and requests of the dead ---------------------------------------------------------------------------------------


def test_a_name_is_given_once(program: Program) -> None:
    failing = program("if begin.owner == 'bad': raise ModelError('no such weights')\nif begin.owner == 'worse': os._exit(3)")
    with Workers("no checkpoint", program=failing) as workers:
        story = told(workers, "one", [1, 2, 3], max_new_tokens=600)
        first = workers._workers["one"]
        with pytest.raises(ValueError, match="a name of its own"):
            workers.start("one")
        assert workers._workers["one"] is first and first.process.poll() is None
        for _ in range(2):  # one that never lived has not used its name up, and nobody is buried for it
            with pytest.raises(ModelError, match="no such weights"):
                workers.start("bad")
            with pytest.raises(WireError, match="worker worse is gone"):
                workers.start("worse")
        assert sorted(workers.names) == ["one", "two"] and workers.register.owner(story) == ("one", 1)
        workers.kill("one")
        eventually(lambda: workers.names == ("two",))
        with pytest.raises(ValueError, match="a name of its own"):
            workers.start("one")
        check_whole(workers, story, [1, 2, 3], 600)


def test_a_worker_that_is_closed_gives_its_requests_to_the_others() -> None:
    with Workers("no checkpoint", ["two"], program=FAKE) as workers:
        one = workers.start("one")
        story = told(workers, "one", [1, 2, 3])
        one.close()
        assert workers.names == ("two",)
        check_whole(workers, story, [1, 2, 3])


def test_a_request_of_the_dead_can_be_cancelled() -> None:
    with Workers("no checkpoint", ["one"], program=FAKE) as workers:
        story = told(workers, "one", [1, 2, 3], max_new_tokens=10_000)
        workers.kill("one")
        eventually(lambda: workers.names == ())
        workers.cancel(story)
        assert workers.ledger.accept(Token(story, 1, 4, 1, "x")) in ("refused", "stale")


def test_a_reader_is_told_when_the_last_worker_dies_and_nobody_spins() -> None:
    """The only other name has been retired: it inherits nothing, and whoever looks for an heir stops looking."""
    with Workers("no checkpoint", program=FAKE) as workers:
        workers.kill("one")
        eventually(lambda: workers.names == ("two",))
        story = told(workers, "two", [1, 2, 3], max_new_tokens=10_000)
        workers.kill("two")
        with pytest.raises(ModelError, match="every worker has died"):
            list(workers.ledger.stream(story, timeout=10))
        before = time.process_time()
        time.sleep(0.5)
        assert time.process_time() - before < 0.25, "a thread of the parent runs in a loop"
        for name, words in (("one", "worker 'one' has died"), ("two", "worker 'two' has died"), ("three", "there is no worker 'three'")):
            with pytest.raises(WireError, match=f"{words}.*; these live: none, so start another"):
                workers.submit(name, [1, 2, 3])
        workers.start("three")
        check_whole(workers, told(workers, "three", [1, 2, 3], max_new_tokens=20), [1, 2, 3], 20)


# --- what submit and move refuse -------------------------------------------------------------------------------------------


def test_a_stop_string_may_be_one_or_several() -> None:
    with Workers("no checkpoint", ["one"], program=FAKE) as workers:
        for given, stops in (("The end.", ("The end.",)), (["a", "bc"], ("a", "bc")), ((), ())):
            story = workers.submit("one", [1, 2, 3], stop=given)
            assert workers.ledger.session(story).stop == stops
        refused: list[tuple[dict[str, Any], str]] = [({"stop": 5}, "stop is 5"), ({"stop": ""}, "stop string is empty"), ({"max_new_tokens": 1.5}, "max_new_tokens is 1.5")]
        for wrong, words in [*refused, ({"request_id": ""}, "request_id is ''"), ({"sampling": 0.8}, "must be a SamplingOptions")]:
            with pytest.raises(ValueError, match=words):
                workers.submit("one", [1, 2, 3], **wrong)


def test_a_move_that_cannot_be_is_refused_in_a_sentence() -> None:
    with Workers("no checkpoint", program=FAKE) as workers:
        story = told(workers, "one", [1, 2, 3], max_new_tokens=1000)
        with pytest.raises(ValueError, match=r"there is no mode 'fast'.*tokens, kv, stop_and_copy or auto"):
            workers.move(story, "two", mode="fast")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="target_gap_tokens is 0"):
            workers.move(story, "two", target_gap_tokens=0)
        with pytest.raises(ModelError, match="is with worker 'one' already"):
            workers.move(story, "one")
        with pytest.raises(WireError, match="there is no worker 'three'; these live"):
            workers.move(story, "three")
        check_whole(workers, story, [1, 2, 3], 1000)
        with pytest.raises(ModelError, match=r"cannot be moved: its text has ended \(length\)"):
            workers.move(story, "two")


# --- Ctrl-C -----------------------------------------------------------------------------------------------------------------

INTERRUPTED = """
import os, signal, sys, threading, time
sys.path.insert(0, {tests!r})
import fake_engine
from sllm_mini.inference.workers import Workers

def interrupt():
    os.killpg(0, signal.SIGINT)

def told():
    with Workers("no checkpoint", program=(fake_engine.__file__,)) as workers:
        story = workers.submit("one", [1, 2, 3], max_new_tokens=100_000, stop_at_eos=False)
        threading.Timer(0.3, interrupt).start()
        try:
            for _ in workers.ledger.stream(story, timeout=20):
                pass
        except KeyboardInterrupt:
            for worker in workers._workers.values():
                os.kill(worker.process.pid, signal.SIGINT)
            heard = len(workers.ledger.pieces(story))
            stream = workers.ledger.stream(story, timeout=20)
            for _ in range(heard + 50):
                next(stream)
            print("still", *sorted(workers.names), "since epoch", workers.register.owner(story).epoch)
            raise

def starting():
    threading.Timer(0.3, interrupt).start()
    with Workers("no checkpoint", program=("-c", "import time; time.sleep(600)")):
        pass

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        {how}()
    except KeyboardInterrupt:
        print("Interrupted.")
"""


@pytest.mark.parametrize(("how", "said"), [("told", "still one two since epoch 1\nInterrupted.\n"), ("starting", "Interrupted.\n")])
def test_an_interrupt_is_for_the_parent_alone(tmp_path: Path, how: str, said: str) -> None:
    """Ctrl-C at a terminal and a notebook's Interrupt reach the whole process group: the workers live on until their parent ends
    them, at once also where they still load, and none of them complains."""
    program = tmp_path / "parent.py"
    program.write_text(INTERRUPTED.format(tests=str(Path(fake_engine.__file__).parent), how=how))
    ended = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=60, start_new_session=True, check=False)
    assert (ended.stdout, ended.stderr, ended.returncode) == (said, "", 0)


# --- a mode by measured speeds ----------------------------------------------------------------------------------------------


def test_a_move_chooses_its_mode_by_speeds() -> None:
    with Workers("no checkpoint", program=FAKE) as workers:
        story = told(workers, "one", [1, 2, 3], max_new_tokens=600)
        with pytest.raises(ValueError, match="chooses by speeds"):
            workers.move(story, "two", mode="auto")
        moved = workers.move(story, "two", mode="auto", speeds=Speeds(1e6, 1e3, 16))
        assert (moved.mode, moved.outcome) == ("tokens", "moved")
        threads = [thread.name for thread in threading.enumerate() if thread.name.startswith("sllm-watch")]
        assert sorted(threads) == ["sllm-watch-one", "sllm-watch-two"]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("sllm-watch")]
