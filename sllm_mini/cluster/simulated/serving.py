"""Requests in simulated time: assigned, preempted, moved live, cut off by a loss; each stretch of work with one planned end.

The half of `SimulatedCluster` that knows requests, but for the two hottest events, which its loop handles itself. Taught in
chapters 07 and 08.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappush

from sllm_mini.cluster.simulated.account import BUSY, IDLE, slot
from sllm_mini.cluster.simulated.machines import FINISH, MOVED, PAUSE, Machines
from sllm_mini.cluster.simulated.moving import move_rounds
from sllm_mini.cluster.simulated.options import SimulationOptions
from sllm_mini.cluster.simulated.parts import Instance, Run, SimulationError
from sllm_mini.cluster.simulated.table import RequestTable, pack_row
from sllm_mini.control.messages import (
    AnyEvent,
    Assign,
    Migrate,
    MigrationFailed,
    MigrationFinished,
    Preempt,
    RequestProgressed,
)
from sllm_mini.types import Warmth

READY_BUSY, READY_IDLE = slot(Warmth.READY, BUSY), slot(Warmth.READY, IDLE)


class Serving(Machines):
    """See the module's words."""

    def __init__(self, options: SimulationOptions) -> None:
        super().__init__(options)
        self.table = RequestTable([], keep=options.keep != "summary")
        self._runs: dict[int, Run] = {}
        self._slow = options.batch_slowdown

    def _assign(self, action: Assign, now: float) -> None:
        run, instance = self._runs[action.request], self._instances[action.instance]
        if instance.warmth != Warmth.READY or instance.active >= instance.spec.concurrency:
            raise SimulationError(f"at {now:.6g} s request {run.id} was assigned to instance {instance.id}, which is at {instance.warmth} with {instance.active} requests")
        if run.start != run.start:
            run.start = now
            if instance.began >= run.arrived:
                run.rung = int(instance.climbed_from)
        run.epoch, run.instance = action.epoch, instance
        run.assigned = run.entered = run.since = now
        instance.runs[run.id] = run
        if not instance.active:
            self._count(instance, now)
            instance.slot = READY_BUSY
        instance.unused_gpu_seconds = instance.unused_byte_seconds = 0.0
        instance.active += 1
        run.version += 1
        self._go_on(run, instance, now)

    def _go_on(self, run: Run, instance: Instance, now: float) -> None:
        """Plans the end of its stretch, alone or with those that share the steps with it."""
        if self._slow:
            self._rescale(instance, now)
        else:
            heappush(self._heap, (now + run.work - run.done, FINISH, self._tick(), run, run.version))

    def _rescale(self, instance: Instance, now: float) -> None:
        """As many requests as it has now share its steps from now on."""
        rate = 1.0 / (1.0 + self._slow * (len(instance.runs) - 1))
        for run in instance.runs.values():
            if not run.paused:
                run.advance(now)
                run.rate = rate
                run.version += 1
                heappush(self._heap, (now + (run.work - run.done) / rate, FINISH, self._tick(), run, run.version))

    def _less(self, instance: Instance, now: float) -> None:
        """One request fewer in it, or on its way to it."""
        instance.active -= 1
        if not instance.active:
            self._count(instance, now)
            instance.slot = READY_IDLE
        elif self._slow:
            self._rescale(instance, now)

    def _release(self, run: Run, now: float) -> None:
        """It computes nowhere now."""
        instance = run.instance
        if instance is not None:
            del instance.runs[run.id]
            run.instance = None
            run.version += 1
            self._span(instance, "run", Warmth.READY, run.entered, now, run.id)
            self._less(instance, now)
        if run.moving is not None:
            self._leave_target(run, now)

    def _preempt(self, action: Preempt, now: float) -> None:
        run = self._runs[action.request]
        self._release(run, now)
        run.epoch = action.epoch
        run.restart()
        run.preemptions += 1
        self.account.preemptions += 1
        self.account.lost_seconds += now - run.entered

    def _end(self, run: Run, outcome: int, now: float) -> None:
        """It will not be answered."""
        self._release(run, now)
        del self._runs[run.id]
        self.table.buffer += pack_row(
            run.id, run.model.number, run.arrived, run.start, run.first, now, run.input_tokens, run.output_tokens, run.rung, run.migrations, run.preemptions,
            -1, outcome,
        )  # fmt: skip

    # Live migration

    def _migrate(self, action: Migrate, now: float) -> None:
        run, target = self._runs[action.request], self._instances[action.target]
        if run.instance is None or run.instance.id != action.source or target.warmth != Warmth.READY or target.active >= target.spec.concurrency:
            raise SimulationError(f"at {now:.6g} s request {run.id} was to move from instance {action.source} to {target.id}, which is at {target.warmth} with {target.active} requests")
        run.epoch, run.moving, run.moved_at = action.epoch, target, now
        if not target.active:
            self._count(target, now)
            target.slot = READY_BUSY
        target.active += 1
        run.advance(now)
        rounds, run.pause_seconds = move_rounds(run.input_tokens + run.tokens_now(), run.prefill_per_token, run.decode / run.rate, self.options.move_gap_tokens)
        heappush(self._heap, (now + self.options.move_seconds + rounds, PAUSE, self._tick(), run, run.epoch))

    def _pause(self, run: Run, epoch: int, now: float) -> None:
        """The source stops; the destination recomputes the last tokens."""
        if run.epoch == epoch and run.moving is not None:
            run.advance(now)
            run.version += 1
            run.paused = True
            heappush(self._heap, (now + run.pause_seconds, MOVED, self._tick(), run, epoch))

    def _moved(self, run: Run, epoch: int, now: float) -> None:
        target = run.moving
        if run.epoch != epoch or target is None:
            return
        tokens = run.tokens_now()
        self._span(target, "move", Warmth.READY, run.moved_at, now, run.id)
        run.moving, run.paused = None, False
        self._release(run, now)
        run.resume(tokens, recomputed=True)
        run.instance, run.entered, run.since, run.rate = target, now, now, 1.0
        target.runs[run.id] = run
        target.unused_gpu_seconds = target.unused_byte_seconds = 0.0
        run.migrations += 1
        self.account.migrations += 1
        self.account.moved_seconds += now - run.moved_at
        self.account.paused_seconds += run.pause_seconds
        self._go_on(run, target, now)
        self._tell(MigrationFinished(run.id, now - run.moved_at, tokens, epoch), now)

    def _leave_target(self, run: Run, now: float) -> None:
        """The move is off: it ended first, or one side is gone. Where the source had stopped, it goes on."""
        target, run.moving = run.moving, None
        self.account.failed_migrations += 1
        if target is not None and target.alive:
            self._span(target, "held", Warmth.READY, run.moved_at, now, run.id)
            self._less(target, now)
        if run.paused:
            run.paused, run.since = False, now
            if run.instance is not None:
                run.version += 1
                self._go_on(run, run.instance, now)

    # Losses

    def _lose(self, instances: Sequence[Instance], event: AnyEvent, now: float) -> None:
        """These are gone, as `event` says. What a client has got of an answer is known and is not generated again."""
        for instance in instances:
            for run in list(instance.runs.values()):
                if not run.paused:
                    run.advance(now)
                self._tell(RequestProgressed(run.id, run.tokens_now(), run.epoch), now)
        gone = set(map(id, instances))
        stay = [run for run in self._runs.values() if run.moving is not None and id(run.moving) in gone and id(run.instance) not in gone]
        for instance in instances:
            for run in list(instance.runs.values()):
                tokens = run.tokens_now()
                run.paused = False
                self._release(run, now)
                run.resume(tokens, recomputed=False)
                if not run.output_tokens:
                    self.account.lost_seconds += now - run.entered
        for run in stay:
            self._leave_target(run, now)
        for instance in instances:
            self._fall(instance, Warmth.COLD, now)
        self._tell(event, now)
        for run in stay:
            if run.id in self._runs:
                self._tell(MigrationFailed(run.id, run.epoch), now)


