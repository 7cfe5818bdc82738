"""Workers climb the warmth ladder one rung an order, fall again, and are noticed when they die or hang. Chapters 05 and 08.

What a worker does is asked of all three launchers; engines are doubles (`fake_engine`) except where weights matter.
"""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fake_engine
import pytest
from fake_engine import FakeEngine, whole_text
from processes import PATIENCE, children_of, is_gone, on_the_path
from range_server import RangeServer
from store_process import PATIENT, eventually

from sllm_mini.checkpoint import Checkpoint, WriteOptions, convert_checkpoint
from sllm_mini.cluster.nodes.launchers import SpawnLauncher, ZygoteLauncher
from sllm_mini.cluster.nodes.threads import ThreadLauncher
from sllm_mini.cluster.nodes.worker_messages import ClimbRung
from sllm_mini.cluster.nodes.workers import Launcher, WorkerHandle
from sllm_mini.cluster.zygote import Zygote, ZygoteError
from sllm_mini.errors import ModelError, StoreError, WireError
from sllm_mini.inference import Engine
from sllm_mini.inference.ownership.ledger import TokenLedger
from sllm_mini.inference.ownership.register import EpochRegister
from sllm_mini.inference.ownership.server import OwnershipServer
from sllm_mini.inference.sampler import SamplingOptions
from sllm_mini.inference.session import Session
from sllm_mini.inference.workers.service import EngineService
from sllm_mini.resources import resource
from sllm_mini.storage import Store, StoreServer
from sllm_mini.types import Warmth
from sllm_mini.wire import WireTimeout

MIB = 1 << 20
ABOVE = [Warmth.RUNTIME, Warmth.DRAM, Warmth.DEVICE, Warmth.READY]
FAKE = "fake_engine:make"
ODD = """
import time
import fake_engine

def hanging(order):
    "Never ends the step of a request that begins with token 7; one that begins with token 8 breaks it."
    engine = fake_engine.make(order)
    decode = engine._decode
    def odd(request):
        first = request.session.token_ids[0]
        if first == 7:
            time.sleep(3600)
        if first == 8:
            raise ZeroDivisionError("no request's own")
        decode(request)
    engine._decode = odd
    return engine

def holding_the_lock(order):
    "Lets no other thread of its process run from its first step with a request on."
    import ctypes
    engine = fake_engine.make(order)
    engine._decode = lambda request: ctypes.PyDLL(None).sleep(3600)
    return engine

def broken(order):
    raise ValueError("there is no such engine")
"""


@dataclass
class Router:
    """The register and the ledger of a test, and the owners that were given out."""

    folder: Path
    register: EpochRegister = field(default_factory=EpochRegister)
    numbers: Iterator[int] = field(default_factory=lambda: iter(range(1000)))

    def __post_init__(self) -> None:
        self.ledger = TokenLedger(self.register)
        self.server = OwnershipServer(self.register, self.ledger, self.folder / "arbiter")

    def order(self, warmth: Warmth, **fields: Any) -> ClimbRung:
        owner = f"owner {next(self.numbers)}"
        given = {"model": "tiny", "owner": owner, "address": str(self.folder / owner), "arbiter": self.server.address} | fields
        return ClimbRung(warmth, **given)

    def begin(self, worker: WorkerHandle, owner: str | None, prompt: tuple[int, ...], *, model: str = "fake", max_new_tokens: int = 12) -> Session:
        assert owner is not None
        session = Session(f"request {next(self.numbers)}", model, prompt, len(prompt), max_new_tokens, SamplingOptions(), (), stop_at_eos=False)
        self.ledger.open(session)
        epoch = self.register.claim(session.request_id, owner, 0)
        assert epoch is not None
        worker.run(session.to_bytes(), epoch)
        return session

    def told(self, session: Session) -> tuple[tuple[int, ...], str, str | None]:
        pieces = list(self.ledger.stream(session.request_id, timeout=PATIENCE))
        return tuple(piece.token_id for piece in pieces), "".join(piece.text for piece in pieces), self.ledger.finish(session.request_id)

    def check(self, worker: WorkerHandle, owner: str | None, prompt: tuple[int, ...] = (1, 2, 3)) -> None:
        """The worker, who serves as `owner`, gives a request's whole text."""
        session = self.begin(worker, owner, prompt)
        assert self.told(session) == whole_text(session)


@dataclass
class Deaths:
    """Why workers died, as they were told."""

    reasons: list[str] = field(default_factory=list)

    def __call__(self, why: str) -> None:
        self.reasons.append(why)

    def only(self) -> str:
        eventually(lambda: self.reasons, PATIENCE)
        (why,) = self.reasons
        return why


@pytest.fixture(scope="module", autouse=True)
def odd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with on_the_path(tmp_path_factory.mktemp("engines"), "odd_engines", ODD) as folder:
        yield folder


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    gc.collect()
    threads, descriptors, children = set(threading.enumerate()), len(os.listdir("/proc/self/fd")), children_of(os.getpid())
    yield
    gc.collect()
    eventually(lambda: set(threading.enumerate()) <= threads)
    eventually(lambda: len(os.listdir("/proc/self/fd")) <= descriptors)
    assert set(children_of(os.getpid())) <= set(children)


@pytest.fixture
def router(tmp_path: Path) -> Iterator[Router]:
    found = Router(tmp_path)
    with found.server:
        yield found


@dataclass
class Launch:
    """Makes launchers of one kind, closed with the test."""

    kind: str
    made: list[Launcher] = field(default_factory=list)

    def __call__(self, engine: str = FAKE, store: Store | None = None) -> Launcher:
        if self.kind == "thread":
            self.made.append(ThreadLauncher(store, engine=engine))
        else:
            self.made.append(ZygoteLauncher(engine=engine) if self.kind == "zygote" else SpawnLauncher(engine=engine))
        return self.made[-1]


@pytest.fixture(params=["zygote", "spawn", "thread"])
def launch(request: pytest.FixtureRequest) -> Iterator[Launch]:
    found = Launch(request.param)
    yield found
    for launcher in found.made:
        launcher.close()


def ready(launcher: Launcher, router: Router, deaths: Callable[[str], None], name: str = "w") -> tuple[WorkerHandle, str | None]:
    """A worker at READY, and its owner's name."""
    worker = launcher.launch(name, deaths)
    orders = [router.order(warmth) for warmth in ABOVE]
    for order in orders:
        worker.climb(order)
    return worker, orders[-1].owner


# --- the ladder --------------------------------------------------------------------------------------------------------


def test_up_and_down_and_up_again(launch: Launch, router: Router) -> None:
    launcher, deaths = launch(), Deaths()
    worker = launcher.launch("w", deaths)
    assert worker.launched.warmth is Warmth.PROCESS and (worker.pid == os.getpid() or worker.launched.private_nbytes > MIB)
    stands = Warmth.PROCESS
    for foot in (Warmth.DEVICE, Warmth.DRAM, Warmth.RUNTIME, Warmth.RUNTIME):
        orders = [router.order(warmth) for warmth in ABOVE if warmth > stands]
        rungs = [worker.climb(order) for order in orders]
        assert [rung.warmth for rung in rungs] == [order.warmth for order in orders] and all(rung.seconds >= 0 for rung in rungs)
        assert worker.pid == os.getpid() or all(rung.private_nbytes > MIB and rung.proportional_nbytes > MIB for rung in rungs)
        router.check(worker, orders[-1].owner)
        worker.fall(Warmth.DEVICE)
        worker.fall(foot)
        worker.fall(Warmth.DEVICE)  # it stands there, or below: no fall
        stands = foot
        with pytest.raises(ModelError, match=f"worker w stands at {foot} and serves nothing"):
            worker.drop("anything", 1)
    assert deaths.reasons == [] and not worker.gone
    worker.close()
    worker.close()
    assert worker.gone and deaths.reasons == []
    with pytest.raises(WireError, match="worker w is gone"):
        worker.climb(router.order(Warmth.DRAM))


def test_rungs_are_climbed_one_by_one(launch: Launch, router: Router, tmp_path: Path) -> None:
    launcher, deaths = launch(), Deaths()
    worker = launcher.launch("w", deaths)
    for wrong in (Warmth.PROCESS, Warmth.DRAM, Warmth.READY):
        with pytest.raises(ModelError, match=f"stands at PROCESS and cannot climb to {wrong}; rungs are climbed one by one"):
            worker.climb(router.order(wrong))
    for below in (Warmth.COLD, Warmth.PROCESS, Warmth.READY):
        with pytest.raises(ModelError, match=f"cannot fall to {below}"):
            worker.fall(below)
    for warmth in ABOVE[:-1]:
        worker.climb(router.order(warmth))
    with pytest.raises(ModelError, match="cannot serve as nobody"):
        worker.climb(ClimbRung(Warmth.READY, "tiny"))
    with OwnershipServer(router.register, router.ledger, tmp_path / "taken") as taken, pytest.raises(WireError, match="taken"):
        worker.climb(router.order(Warmth.READY, address=taken.address))
    last = router.order(Warmth.READY)
    worker.climb(last)  # an error has left it where it stood
    router.check(worker, last.owner)
    assert deaths.reasons == []


def test_an_engine_that_cannot_be_made_is_told(launch: Launch, router: Router) -> None:
    deaths = Deaths()
    with pytest.raises((ModelError, ZygoteError, WireError)):
        launch("odd_engines:nowhere").launch("w", deaths)
    worker = launch("odd_engines:broken").launch("w", deaths)
    for warmth in ABOVE[:-1]:
        worker.climb(router.order(warmth))
    with pytest.raises(ModelError, match="there is no such engine"):
        worker.climb(router.order(Warmth.READY))
    assert not worker.gone and deaths.reasons == []


def test_requests_move_between_workers(launch: Launch, router: Router) -> None:
    launcher, deaths = launch(), Deaths()
    source, owner = ready(launcher, router, deaths, "source")
    target = launcher.launch("target", deaths)
    orders = [router.order(warmth) for warmth in ABOVE]
    for order in orders:
        target.climb(order)
    session = router.begin(source, owner, (1, 2, 3), max_new_tokens=150)
    next(iter(router.ledger.stream(session.request_id, timeout=PATIENCE)))
    report = source.move(session.request_id, orders[-1].address)
    assert report.outcome == "moved" and router.register.owner(session.request_id).owner == orders[-1].owner
    source.fall(Warmth.RUNTIME)
    assert router.told(session) == whole_text(session)
    dropped = router.begin(target, orders[-1].owner, (4, 5), max_new_tokens=100_000)
    router.ledger.end(dropped.request_id)
    target.drop(dropped.request_id, router.register.owner(dropped.request_id).epoch)
    target.drop("of nobody", 1)
    router.check(target, orders[-1].owner)


# --- real weights ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return convert_checkpoint(resource("data/models/tiny"), tmp_path_factory.mktemp("models") / "tiny", options=WriteOptions(partition_nbytes=3_000_000))


@pytest.fixture
def served(tmp_path: Path, tiny: Checkpoint) -> Iterator[tuple[Store, str]]:
    """A store in this process that knows the model, and its socket."""
    with Store(tmp_path / "store", dram_nbytes=64 * MIB, chunk_nbytes=2 * MIB, remote=PATIENT) as store, StoreServer(store, tmp_path / "socket") as server:
        store.register("tiny", tiny.path)
        yield store, server.address


def leases(store: Store) -> int:
    return sum(place.leases for model in store.models() for place in model.places)


def test_each_rung_holds_what_it_should_and_says_what_it_took(
    launch: Launch, router: Router, served: tuple[Store, str], tiny: Checkpoint, record_property: Callable[[str, object], None]
) -> None:
    """Also the figures by which a fork and a fresh interpreter differ: one has the runtime from its first instruction."""
    store, address = served
    launcher, deaths = launch("", store), Deaths()
    worker = launcher.launch("w", deaths)
    rungs = [worker.launched]
    for warmth in ABOVE:
        order = router.order(warmth, store=address, digest=tiny.digest, warm_up=True)
        rungs.append(worker.climb(order))
        assert leases(store) == (warmth >= Warmth.DRAM)
    record_property("rungs", [f"{rung.warmth} {rung.seconds:.3f} s, {rung.private_nbytes / 1e6:.1f} MB private" for rung in rungs])
    _, runtime, *_ = rungs
    if launch.kind == "spawn":
        assert runtime.private_nbytes > 3 * rungs[0].private_nbytes and runtime.seconds > rungs[0].seconds and launcher.shared_nbytes() == 0
    elif launch.kind == "zygote":
        assert runtime.seconds < rungs[0].seconds and launcher.shared_nbytes() > 3 * rungs[0].private_nbytes
    if launch.kind != "thread":
        assert rungs[2].private_nbytes - rungs[1].private_nbytes < tiny.nbytes, "it has a copy of the weights"
    expected = Engine.load(tiny.path).complete([3, 4, 5], max_new_tokens=6, stop_at_eos=False)
    session = router.begin(worker, order.owner, (3, 4, 5), model=tiny.digest, max_new_tokens=6)
    assert router.told(session) == (expected.token_ids, expected.text, "length")

    worker.fall(Warmth.DEVICE)
    assert leases(store) == 1
    again = router.order(Warmth.READY, store=address)
    worker.climb(again)
    assert router.told(router.begin(worker, again.owner, (3, 4, 5), model=tiny.digest, max_new_tokens=6))[0] == expected.token_ids
    worker.fall(Warmth.DRAM)
    assert leases(store) == 1
    with pytest.raises(ModelError, match="holds tiny and not other"):
        worker.climb(router.order(Warmth.DEVICE, model="other", store=address))
    worker.climb(router.order(Warmth.DEVICE, store=address))
    worker.climb(last := router.order(Warmth.READY, store=address))
    worker.fall(Warmth.RUNTIME)
    eventually(lambda: leases(store) == 0)
    assert store.evict("tiny", "dram") >= tiny.nbytes
    with pytest.raises(StoreError, match="no model is registered as 'other'"):
        worker.climb(router.order(Warmth.DRAM, model="other", store=address))
    with pytest.raises(ModelError, match="other weights of tiny than were registered"):
        worker.climb(router.order(Warmth.DRAM, store=address, digest="another"))
    eventually(lambda: leases(store) == 0)
    for warmth in ABOVE[1:]:
        worker.climb(last := router.order(warmth, store=address))
    assert router.told(router.begin(worker, last.owner, (3, 4, 5), model=tiny.digest, max_new_tokens=6))[0] == expected.token_ids
    gc.disable()
    try:
        worker.close()
        eventually(lambda: leases(store) == 0)
    finally:
        gc.enable()
    assert deaths.reasons == []


@dataclass
class Gated(RangeServer):
    """Keeps the last data file back until `gate` is set; asking for its size, a range of one byte, is answered."""

    gate: threading.Event = field(default_factory=threading.Event)

    def _answer(self, handler: Any) -> None:
        if handler.path.endswith("data-00003.bin") and handler.headers.get("Range") != "bytes=0-0":
            self.gate.wait(PATIENCE)
        super()._answer(handler)


@pytest.fixture
def gated(tiny: Checkpoint, served: tuple[Store, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Gated]:
    """The model comes from a server that holds its last layers back."""
    monkeypatch.setenv("NO_PROXY", "*")
    server = Gated(tiny.path.parent)
    with server:
        served[0].forget("tiny")
        served[0].register("tiny", f"{server.url}/tiny")
        try:
            yield server
        finally:
            server.gate.set()


def test_with_overlap_it_serves_while_bytes_arrive_and_waiting_for_them_is_not_being_stuck(router: Router, served: tuple[Store, str], gated: Gated, tiny: Checkpoint) -> None:
    store, address = served
    launcher, deaths = ThreadLauncher(store), Deaths()
    worker = launcher.launch("w", deaths)
    for warmth in ABOVE:
        worker.climb(order := router.order(warmth, store=address, overlap=True))
    with pytest.raises(WireTimeout, match="had not arrived"):
        worker.whole(0.05)
    session = router.begin(worker, order.owner, (3, 4, 5), model=tiny.digest, max_new_tokens=6)
    instance = worker._climber._instance
    assert instance is not None
    eventually(lambda: any(span.lane == "compute" for span in instance.spans))
    assert worker.stuck_seconds(1.0) == 0
    time.sleep(0.2)
    assert worker.stuck_seconds(1.0) == 0
    gated.gate.set()
    worker.whole(PATIENCE)
    assert len(router.told(session)[0]) == 6 and deaths.reasons == []
    launcher.close()


def test_a_climb_without_overlap_ends_with_its_worker(router: Router, served: tuple[Store, str], gated: Gated) -> None:
    store, address = served
    launcher, deaths = ThreadLauncher(store), Deaths()
    worker = launcher.launch("w", deaths)
    worker.climb(router.order(Warmth.RUNTIME))
    failures: list[BaseException] = []

    def climb() -> None:
        try:
            worker.climb(router.order(Warmth.DRAM, store=address))
        except BaseException as error:  # noqa: BLE001 - the test looks at it
            failures.append(error)

    climbing = threading.Thread(target=climb)
    climbing.start()
    eventually(lambda: leases(store) == 1)
    worker.kill()
    climbing.join(PATIENCE)
    assert "cancelled" in str(failures.pop()) and deaths.only() == "it was killed"
    gc.collect()
    eventually(lambda: leases(store) == 0)
    launcher.close()


# --- death and silence -------------------------------------------------------------------------------------------------


def test_a_death_is_told_once_with_its_reason(launch: Launch, router: Router) -> None:
    launcher, deaths = launch(), Deaths()
    worker, owner = ready(launcher, router, deaths)
    session = router.begin(worker, owner, (1, 2, 3), max_new_tokens=100_000)
    next(iter(router.ledger.stream(session.request_id, timeout=PATIENCE)))
    worker.kill()
    assert deaths.only() == ("it was killed" if launch.kind == "thread" else "its process ended with status -9") and worker.gone
    said = len(router.ledger.session(session.request_id).token_ids)
    with pytest.raises(WireError, match="worker w is gone"):
        worker.run(session.to_bytes(), 1)
    heir, name = ready(launcher, router, deaths, "heir")
    router.register.retire(str(owner))
    begun = router.ledger.restart(session.request_id, str(name), 1)
    assert begun is not None and len(begun[0].token_ids) <= said + 256
    heir.run(begun[0].to_bytes(), begun[1])
    eventually(lambda: len(router.ledger.session(session.request_id).token_ids) > said + 20, PATIENCE)
    worker.close()
    launcher.close()
    assert len(deaths.reasons) == 1
    with pytest.raises(WireError, match="this launcher was closed"):
        launcher.launch("late", deaths)


@pytest.mark.parametrize("kind", [ZygoteLauncher, SpawnLauncher])
def test_a_step_that_never_ends_is_noticed_while_pings_are_answered(router: Router, kind: Any) -> None:
    launcher, deaths = kind(engine="odd_engines:hanging"), Deaths()
    worker, owner = ready(launcher, router, deaths)
    worker.watch(5.0, 1.0)
    router.check(worker, owner)
    assert worker.stuck_seconds(PATIENCE) < 0.8 and not worker.gone
    router.begin(worker, owner, (7, 1))
    eventually(lambda: worker.gone or worker.stuck_seconds(PATIENCE) > 0.1, PATIENCE)
    assert "its engine had not ended a step for" in deaths.only()
    launcher.close()


def test_a_thread_that_hangs_is_cut_off(router: Router, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    engine = FakeEngine()
    decode = engine._decode

    def odd(request: Any) -> None:
        if len(request.session.new_ids) == 5:
            gate.wait(PATIENCE)
        decode(request)

    monkeypatch.setattr(engine, "_decode", odd)
    monkeypatch.setattr(fake_engine, "make", lambda order: engine)
    launcher, deaths = ThreadLauncher(engine=FAKE), Deaths()
    worker, owner = ready(launcher, router, deaths)
    worker.watch(0.5, 0.3)
    session = router.begin(worker, owner, (1, 2, 3))
    assert "its engine had not ended a step for" in deaths.only() and worker.gone
    said = router.ledger.session(session.request_id).token_ids
    gate.set()
    launcher.close()  # waits until the step has ended
    assert router.ledger.session(session.request_id).token_ids == said, "it was heard after it was given up"


@pytest.mark.parametrize("how", ["stopped", "holding the lock"])
@pytest.mark.parametrize("kind", [ZygoteLauncher, SpawnLauncher])
def test_a_process_that_answers_nothing_is_noticed(router: Router, kind: Any, how: str) -> None:
    launcher, deaths = kind(engine="odd_engines:holding_the_lock" if how == "holding the lock" else FAKE), Deaths()
    worker, owner = ready(launcher, router, deaths)
    worker.watch(0.8, 60.0)
    if how == "stopped":
        os.kill(worker.pid, signal.SIGSTOP)
    else:
        with suppress(WireError):  # its first step may come before the answer
            router.begin(worker, owner, (1, 2, 3))
    assert deaths.only() == "it answered nothing for 0.8 s"
    launcher.close()


def test_a_worker_may_be_closed_by_whoever_hears_of_its_death(launch: Launch, router: Router) -> None:
    closed = threading.Event()

    def on_death(_why: str) -> None:
        worker.close()
        closed.set()

    worker, _ = ready(launch(), router, on_death)
    worker.watch(PATIENCE)
    worker.kill()
    assert closed.wait(PATIENCE)


def test_a_step_that_breaks_ends_its_worker(launch: Launch, router: Router, capfd: pytest.CaptureFixture[str]) -> None:
    launcher, deaths = launch("odd_engines:hanging"), Deaths()
    worker, owner = ready(launcher, router, deaths)
    router.begin(worker, owner, (8, 1))
    why = deaths.only()
    assert worker.gone
    if launch.kind == "thread":
        assert why == "its engine cannot be stepped any more: no request's own"
    else:
        assert why == "its process ended with status 1" and "no request's own" in capfd.readouterr().err
    launcher.close()


OWNER = """
import sys, time
sys.path[:0] = sys.argv[1].split(":")
from sllm_mini.cluster.nodes.launchers import SpawnLauncher, ZygoteLauncher
workers = [kind(engine="fake_engine:make").launch("w", print) for kind in (SpawnLauncher, ZygoteLauncher)]
print(*(worker.pid for worker in workers), flush=True)
time.sleep(3600)
"""


def test_workers_end_with_their_agent() -> None:
    search = ":".join([os.fspath(Path(fake_engine.__file__).parent)])
    with subprocess.Popen([sys.executable, "-c", OWNER, search], stdout=subprocess.PIPE, text=True) as agent:
        assert agent.stdout is not None
        pids = [int(pid) for pid in agent.stdout.readline().split()]
        agent.kill()
    assert len(pids) == 2 and all(is_gone(pid) for pid in pids)


# --- zygotes -----------------------------------------------------------------------------------------------------------


def test_a_zygote_that_hangs_keeps_its_workers_and_another_forks(router: Router) -> None:
    launcher = ZygoteLauncher(engine=FAKE, fork_seconds=0.5)
    first, last = Deaths(), Deaths()
    old, owner = ready(launcher, router, first, "old")
    assert launcher._home is not None and launcher._home.zygote is not None
    hung = launcher._home.zygote.pid
    os.kill(hung, signal.SIGSTOP)
    new, heir = ready(launcher, router, last, "new")
    router.check(old, owner)
    router.check(new, heir)
    assert launcher.shared_nbytes() > 0
    old.kill()
    assert "its process ended" in first.only()
    assert is_gone(hung), "nobody needs it any more"
    router.check(new, heir)
    launcher.close()
    assert last.reasons == []


def test_a_zygote_that_is_killed_takes_its_workers_along_and_another_forks(router: Router) -> None:
    launcher, deaths = ZygoteLauncher(engine=FAKE), Deaths()
    ready(launcher, router, deaths, "old")
    assert launcher._home is not None and launcher._home.zygote is not None
    os.kill(launcher._home.zygote.pid, signal.SIGKILL)
    assert "its process ended" in deaths.only()
    new, heir = ready(launcher, router, Deaths(), "new")
    router.check(new, heir)
    launcher.close()


def test_launchers_share_a_zygote_by_its_path_and_outlive_it(router: Router) -> None:
    with Zygote(["fake_engine"], ["sllm_mini.cluster.nodes.climbing:serve"]) as zygote:
        launchers = [ZygoteLauncher(path=zygote.path, engine=FAKE) for _ in range(2)]
        for launcher in launchers:
            worker, owner = ready(launcher, router, Deaths())
            router.check(worker, owner)
            assert str(worker.pid) in children_of(zygote.pid) and launcher.shared_nbytes() == 0
        launchers[0].close()
        assert len(children_of(zygote.pid)) == 1
    worker, owner = ready(launchers[1], router, Deaths())  # with a zygote of its own now
    router.check(worker, owner)
    launchers[1].close()


def test_many_threads_launch_from_a_zygote_that_died(router: Router) -> None:
    launcher = ZygoteLauncher(engine=FAKE)
    assert launcher._home is not None and launcher._home.zygote is not None
    os.kill(launcher._home.zygote.pid, signal.SIGKILL)
    workers: list[WorkerHandle] = []
    threads = [threading.Thread(target=lambda n=n: workers.append(launcher.launch(f"w{n}", Deaths()))) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert sorted(str(worker.pid) for worker in workers) == sorted(children_of(launcher._home.zygote.pid)), "they are not all of one zygote"
    launcher.close()


# --- the service -------------------------------------------------------------------------------------------------------


def service(router: Router, engine: Any, owner: str, **options: Any) -> EngineService:
    return EngineService(engine, owner=owner, address=router.folder / owner, arbiter=router.server.address, on_error=options.pop("on_error", pytest.fail), **options)


def begin(router: Router, serving: EngineService, request_id: str, *, max_new_tokens: int = 12) -> Session:
    session = Session(request_id, "fake", (1, 2, 3), 3, max_new_tokens, SamplingOptions(), (), stop_at_eos=False)
    router.ledger.open(session)
    epoch = router.register.claim(request_id, serving.owner, 0)
    assert epoch is not None
    serving.run(session, epoch)
    return session


def test_a_service_that_is_closed_has_said_what_it_computed_and_holds_nothing(router: Router) -> None:
    engine: Any = FakeEngine(step_seconds=0.001)
    serving = service(router, engine, "one")
    session = begin(router, serving, "story", max_new_tokens=100_000)
    next(iter(router.ledger.stream("story", timeout=PATIENCE)))
    said: list[int] = []
    decode = engine._decode

    def noting(request: Any) -> None:
        decode(request)
        said.append(len(request.session.token_ids))

    engine._decode = noting
    eventually(lambda: len(said) > 3, PATIENCE)
    serving.close()
    serving.close()
    assert engine.requests == () and len(router.ledger.session("story").token_ids) == said[-1] > len(session.token_ids)


def test_a_service_that_is_cut_off_is_not_heard(router: Router, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, began = threading.Event(), threading.Event()
    deliver, delivered = router.ledger.deliver, 0

    def slow(tokens: Any) -> Any:
        nonlocal delivered
        delivered += 1
        began.set()
        gate.wait(PATIENCE)
        return deliver(tokens)

    monkeypatch.setattr(router.ledger, "deliver", slow)
    engine = FakeEngine(step_seconds=0.001)
    serving = service(router, engine, "one")
    begin(router, serving, "story", max_new_tokens=100_000)
    assert began.wait(PATIENCE)
    before = len(engine.session("story").token_ids)
    eventually(lambda: len(engine.session("story").token_ids) > before + 3)  # they wait for the delivery that is on its way
    serving.cut()
    gate.set()
    serving.close()
    assert delivered == 1 and len(router.ledger.session("story").token_ids) < before + 3


def test_stuck_is_counted_from_when_the_bytes_were_there(router: Router) -> None:
    whole, gate, engine = threading.Event(), threading.Event(), FakeEngine()
    step: Callable[[], bool] = engine.step
    engine.step = lambda: (gate.wait(PATIENCE), step())[1]  # type: ignore[method-assign]
    serving = service(router, engine, "one", whole=whole.is_set)
    assert serving.stuck_seconds() == 0
    time.sleep(0.6)
    assert serving.stuck_seconds() == 0
    whole.set()
    assert serving.stuck_seconds() < 0.4, "not from when the step began"
    time.sleep(0.2)
    assert 0.2 <= serving.stuck_seconds() < 0.2 + PATIENCE
    gate.set()
    eventually(lambda: serving.stuck_seconds() < 0.15)
    serving.close()


def test_a_service_without_an_address_leaves_nothing(router: Router) -> None:
    with pytest.raises(WireError):
        service(router, FakeEngine(), "no/such/folder")


def test_what_ends_a_service_is_told_once(router: Router) -> None:
    errors: list[BaseException] = []
    engine: Any = FakeEngine()
    serving = service(router, engine, "one", on_error=errors.append)
    engine.step = lambda: 1 / 0
    eventually(lambda: errors)
    serving.close()
    assert [type(error) for error in errors] == [ZeroDivisionError]
    router.server.close()
    deaf = EngineService(FakeEngine(), owner="two", address=router.folder / "two", arbiter=router.server.address, on_error=errors.append)  # type: ignore[arg-type]
    session = Session("story", "fake", (1, 2, 3), 3, 12, SamplingOptions(), (), stop_at_eos=False)
    deaf.run(session, 1)
    eventually(lambda: len(errors) == 2, PATIENCE)
    assert isinstance(errors[1], WireError)
    deaf.close()


def test_a_service_is_closed_only_when_moves_out_of_it_are_over(router: Router, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, began = threading.Event(), threading.Event()

    def slow(*_: object, **__: object) -> None:
        began.set()
        gate.wait(PATIENCE)

    monkeypatch.setattr("sllm_mini.inference.workers.service.migrate", slow)
    serving = service(router, FakeEngine(), "one")
    moving = threading.Thread(target=serving.move, args=("story", "anywhere"))
    moving.start()
    assert began.wait(PATIENCE)
    with monkeypatch.context() as hasty:
        hasty.setattr("sllm_mini.inference.workers.service._MOVES_OUT_SECONDS", 0.05)
        with pytest.raises(WireError, match="one was closed and 1 of its requests are still being moved"):
            serving.close()
    closing = threading.Thread(target=serving.close)
    closing.start()
    closing.join(0.1)
    assert closing.is_alive()
    gate.set()
    closing.join(PATIENCE)
    assert not closing.is_alive()
    moving.join()
