"""The live cluster: the controller of the simulation over real nodes. Chapter 08.

Whatever happens (a client asks, a node answers, a request ends, a timer is due) is put into one queue; one thread takes it out,
tells the controller, and puts its actions into nodes' hands as orders. It waits for nobody. Weights go from store to node, tokens
from worker to ledger; neither passes here.
"""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from sllm_mini.cluster.accounting import Accountant
from sllm_mini.cluster.api import Ask, Cluster, Deployment, Metrics, NodeReport, RefusedError, keep_alive_seconds
from sllm_mini.cluster.bases import text_source
from sllm_mini.cluster.journal import Journal, Past, read_journal, repair
from sllm_mini.cluster.live.adding import Adder, Handles
from sllm_mini.cluster.live.carry import Carry
from sllm_mini.cluster.live.handles import handles_of
from sllm_mini.cluster.live.keeping import Keeper
from sllm_mini.cluster.live.loop import Loop
from sllm_mini.cluster.live.members import Members, of_deployment
from sllm_mini.cluster.live.options import ControlOptions, LiveOptions
from sllm_mini.cluster.live.prompts import Prompts
from sllm_mini.cluster.live.readings import metrics_of, reports_of, result_of
from sllm_mini.cluster.live.reviving import Reviver
from sllm_mini.cluster.live.spreading import Fetched, Spreading
from sllm_mini.cluster.live.stream import LiveStream
from sllm_mini.cluster.nodes import messages as node
from sllm_mini.cluster.reports import asked_warm
from sllm_mini.cluster.router import Router
from sllm_mini.cluster.simulated.result import SimulationResult
from sllm_mini.control import messages as m
from sllm_mini.control.multicast.gather import PlanKind, plan_of
from sllm_mini.control.replay import read_log
from sllm_mini.errors import SllmError, UnsupportedError
from sllm_mini.types import Tier, Warmth
from sllm_mini.wire.tcp import ensure_key, join_address

Resume = bool | Literal["models"]
"""See `open_cluster`."""


class LiveCluster:
    """See `api.Cluster` and the module. `handles` makes nodes; `folder` is this cluster's own: with `resume` it goes on with what
    another one left there, which must have ended. Safe from several threads. Raises SllmError where the folder has another
    cluster's files, or, to resume, has none."""

    def __init__(self, handles: Handles, control: ControlOptions, folder: Path, options: LiveOptions | None = None, *, resume: Resume = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.options, self.run = folder, options or LiveOptions(), secrets.token_hex(6)
        self._handles, self._control = handles, control
        self._prompts, self._closing, self._closed = Prompts(), threading.Lock(), False
        self._keeper = Keeper(folder, self.options.snapshot_seconds)
        with ExitStack() as made:
            self._make(control, resume, made)
            made.pop_all()

    def _make(self, control: ControlOptions, resume: Resume, made: ExitStack) -> None:
        """`made` is what is to be given back where it cannot be made whole."""
        folder, controller, path = self.folder, control.controller(), self.folder / "ledger.bin"
        past, before, deployments = list[Past](), 0.0, list[Deployment]()
        if resume:
            repair(path)
            past, (before, deployments) = read_journal(path), self._keeper.go_on(controller)
            made.callback(self._keeper.close)
            before = max([before, *(each.pieces[-1].arrived if each.pieces else each.opened.at for each in past)])
        self._opened = time.monotonic() - before
        self._journal = Journal(path, lambda: self.now)
        made.callback(self._journal.close)
        accountant = Accountant(self.options.keep_spans)
        for record in read_log(self._keeper.log()) if resume else ():
            accountant.tell(record)
        self._loop = Loop(controller, self._keeper.write, accountant, lambda: self.now, self._beat, self._broken)
        address = join_address(self.options.host, 0) if self.options.host else os.fspath(folder / f"arbiter-{self.run}")
        if self.options.host:
            ensure_key()
        self._router = Router(
            address, now=lambda: self.now, opened=self._opened, on_end=self._ended, journal=self._journal,
            max_waiting=self.options.max_waiting, max_restarts=self.options.max_restarts,
        )  # fmt: skip
        made.callback(self._router.close, "503: the cluster could not be opened")
        made.callback(self._journal.close)  # before that: to be resumed, what goes on must not be over there
        carry = Carry(self._router, self.options, self.run, lambda: self.now, self._loop.set_timer, self._concurrency)
        self._spreading = carry.spreading = Spreading(self.options, self.run, carry.handles, self._holders, lambda: self.now)
        self._members = Members(carry, lambda handle: node.Join(handle.name, handle.incarnation, self.run, self._router.address), self._keeper.deployed)
        self._loop.carry, self._loop.members = carry, self._members
        self._adder = Adder(self._loop, self._handles, self.options.join_seconds)
        self._reviver = self._members.reviver = Reviver(
            self.add_node, lambda name: self._loop.call(lambda: self._members.is_away(name)), lambda name, times: self._loop.call(lambda: self._members.given_up(name, times)),
            lambda: self.now, self.options.revive, self.options.revive_seconds,
        )  # fmt: skip
        if resume:
            self._members.deployed = {each.spec.name: (each, "") for each in deployments}
            for one in past:
                self._router.reopen(one)
                if resume == "models" and not one.over:
                    self._router.cancel(one.opened.request_id)
            self._reconcile()
        else:
            self._keeper.begin(control.header())  # last: a folder with a log is a cluster's
            made.callback(self._keeper.close)
        self._loop.start()

    @classmethod
    def open(cls, kind: str, nodes: Sequence[m.NodeSpec], control: ControlOptions, folder: Path, options: LiveOptions, *, resume: Resume = False) -> LiveCluster:
        """See `open_cluster`. With `resume`, its requests go on once the first node has come up."""
        cluster = cls(handles_of(kind, folder, options), control, folder, options, resume=resume)
        try:
            with ThreadPoolExecutor(max(1, len(nodes)), thread_name_prefix="sllm-join") as joining:
                for joined in [joining.submit(cluster.add_node, spec) for spec in nodes]:
                    joined.result()
        except BaseException:
            cluster.close()
            raise
        return cluster

    # Asked for

    def deploy(self, deployment: Deployment) -> None:
        done: Future[None] = Future()
        self._loop.do(lambda: self._members.deploy(deployment, done))
        try:
            done.result(self.options.join_seconds)
        except TimeoutError as error:
            if self._loop.call(lambda: self._members.give_up(deployment)):
                raise SllmError(f"the nodes did not register {deployment.spec.name} within {self.options.join_seconds:g} s") from error
            done.result()  # it came to its end just now
        self._prompts.keep(each.source for each in self.models())

    def delete(self, model: str) -> None:
        self._loop.do(lambda: self._members.delete(model))
        self._loop.call(lambda: self._spreading.forget(model))
        self._loop.call(lambda: self._keeper.undeployed(self.models()))
        self._prompts.keep(each.source for each in self.models())

    def prewarm(self, model: str, warmth: Warmth = Warmth.READY, keep_alive: float | None = None) -> None:
        self._deployed(model)
        events = asked_warm(model, warmth, keep_alive)
        self._loop.do(lambda: events)

    def unload(self, model: str) -> None:
        self._deployed(model)
        self._loop.do(lambda: [m.UnloadAsked(model)])

    def submit(self, ask: Ask) -> LiveStream:
        self._loop.check()
        if ask.embed and not self.embeds:
            raise UnsupportedError("the engines of this cluster have no hidden states to make embeddings of; ask for a text")
        if self._journal.lost:
            raise RefusedError(503, self._journal.error)
        (deployment, digest), keep_alive = self._deployed(ask.model), keep_alive_seconds(ask.keep_alive)
        self._router.check_room()
        session = self._prompts.session(ask, text_source(deployment, self._members.deployments), digest)
        events: list[m.AnyEvent] = [self._router.open(session, ask.model, ask.prefix)]
        if keep_alive is not None:
            events.append(m.KeepAliveAsked(ask.model, keep_alive))
        self._loop.post(lambda: events)
        return LiveStream(self._router, session.request_id)

    def stream(self, request_id: str) -> LiveStream:
        self._router.report(request_id)
        return LiveStream(self._router, request_id)

    def add_node(self, spec: m.NodeSpec) -> None:
        self._adder.add(spec)

    def spread(self, model: str, nodes: Sequence[str], plan: PlanKind = "binomial", timeout: float | None = None) -> dict[str, Fetched]:
        """Brings a model into the memory of these nodes, from whoever has it there, else from its source, which is read once; returns when each
        node's part is over, and what became of it. Raises SllmError for a node or a model that is not there, TimeoutError."""
        gathered = plan_of(*self._loop.call(lambda: self._spreading.around(model, nodes)), plan, alone=True)
        if gathered is None:
            return {}
        done: Future[dict[str, Fetched]] = Future()
        self._loop.do(lambda: self._spreading.spread(model, gathered, done))
        return done.result(timeout)

    def kill_node(self, name: str) -> None:
        handle = self._loop.carry.handles.get(name)
        if handle is None:
            raise SllmError(f"there is no node {name} that is alive; nodes() has those that are")
        handle.kill()
        self._loop.do(lambda: self._members.gone(handle, "it was killed"))

    # Read

    @property
    def now(self) -> float:
        return time.monotonic() - self._opened

    def nodes(self) -> list[NodeReport]:
        return self._loop.call(lambda: reports_of(self._loop, self._reviver.returning()))

    @property
    def embeds(self) -> bool:
        return not self.options.node.engine

    def models(self) -> list[Deployment]:
        return [*self._members.deployments.values()]

    def wait(self, until: Callable[[Cluster], bool], timeout: float) -> bool:
        """Looks whenever something has happened, and twenty times a second."""
        end, changed = time.monotonic() + timeout, threading.Event()
        self._loop.watch(changed)
        try:
            while not until(self):
                left = end - time.monotonic()
                if left <= 0:
                    return False
                changed.wait(min(left, 0.05))
                changed.clear()
            return True
        finally:
            self._loop.unwatch(changed)

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def metrics(self) -> Metrics:
        return self._loop.call(lambda: metrics_of(self._loop, self._router, self._reviver))

    def result(self) -> SimulationResult:
        return self._loop.call(lambda: result_of(self._loop, self._router, self._control.names(), self.now))

    def log(self) -> Iterable[bytes]:
        return self._keeper.log()

    def restart_controller(self) -> None:
        """Saves the controller, makes another of the same options, and goes on with that one; nodes and readers notice nothing."""
        self._loop.call(self._renew)

    def close(self) -> None:
        with self._closing:
            if self._closed:
                return
            self._closed = True
        self._reviver.stop()
        self._loop.stop()
        self._spreading.fail_all(SllmError("the cluster was closed before the model was everywhere"))
        self._members.fail_all(SllmError("the cluster was closed; open it again"))
        self._router.close("503: the cluster was closed before the text ended")
        closing = [threading.Thread(target=handle.close, name=f"sllm-close-{handle.name}") for handle in self._loop.carry.handles.values()]
        for thread in closing:
            thread.start()
        for thread in closing:
            thread.join()
        self._reviver.close()
        self._keeper.close()
        self._journal.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # On the thread that decides

    def _ended(self, number: int) -> None:
        self._loop.post(lambda: self._loop.carry.over(number))

    def _holders(self, model: str) -> dict[str, Tier]:
        known = self._loop.controller.cluster.models.get(model)
        return {} if known is None else known.cached_on

    def _deployed(self, model: str) -> tuple[Deployment, str]:
        found = self._members.deployed.get(model)
        if found is None:
            raise RefusedError(404, f"there is no model {model}; deploy it first")
        return found

    def _concurrency(self, model: str) -> int:
        return self._loop.controller.cluster.models[model].spec.concurrency

    def _beat(self) -> float:
        """What is to be done now and then; seconds until the next time."""
        now = self.now
        for event in self._members.forget(self._loop.controller.cluster.models):
            self._loop.tell(event)
        if now >= self._keeper.next_at:
            self._keeper.save(self._loop.controller, now, self._journal, self.options.journal_nbytes)
            self._router.forget(now - self.options.remember_seconds)
        return min(self._keeper.next_at - now, self._spreading.due(now))

    def _broken(self, error: BaseException) -> None:
        """Something that must not be: the nodes go, and all that goes on fails."""
        failed = SllmError(f"the cluster has ended: {error}")
        self._reviver.stop()
        self._members.fail_all(failed)
        self._spreading.fail_all(failed)
        self._router.fail_all(f"500: {failed}")
        for handle in self._loop.carry.handles.values():
            handle.kill()

    def _renew(self) -> None:
        data = self._loop.controller.to_bytes()
        controller = self._control.controller()
        controller.restore(data)
        self._loop.renew(controller)

    def _reconcile(self) -> None:
        """What the controller knew and what the ledger says, after a break in which all nodes were lost."""
        controller = self._loop.controller
        for timer, what in controller.timers.pending.items():
            self._loop.set_timer(timer, what.at)
        if nodes := list(controller.cluster.nodes):
            self._loop.tell(m.NodeLost(nodes[0], tuple(nodes[1:])))
        for deployment, _ in self._members.deployed.values():  # written, and not told any more
            known = controller.cluster.models.get(deployment.spec.name)
            if known is None or known.deleted or known.spec != deployment.spec:
                for event in of_deployment(deployment):
                    self._loop.tell(event)
        for number in list(controller.cluster.requests):
            if not self._router.is_open(number):
                self._loop.tell(m.RequestCancelled(number))
        for arrived in self._router.waiting():
            if arrived.request not in controller.cluster.requests:
                self._loop.tell(arrived)
