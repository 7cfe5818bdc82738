"""One run of a simulated cluster that is asked of, and what its log says of each request. Part of `interactive`; chapter 08."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

from sllm_mini.cluster.simulated.result import SimulationResult
from sllm_mini.cluster.simulated.table import RequestRow
from sllm_mini.cluster.trace.request import TraceRequest
from sllm_mini.control import messages as m
from sllm_mini.control.replay import read_log
from sllm_mini.types import Tier, Warmth


class Rerun:
    """`asked` is what it was run for, `records` its log and `rows` the requests that ended, by their numbers."""

    def __init__(self, asked: object, trace: Sequence[TraceRequest], lines: list[bytes], result: SimulationResult) -> None:
        self.asked, self.lines, self.result, self._trace = asked, lines, result, trace
        self.records = list(read_log(lines))
        self.rows = {row.request: row for row in result.requests}
        self._times: dict[int, list[float]] = {}

    def given(self, number: int) -> list[float]:
        """When it was assigned."""
        return [record.now for record in self.records for action in record.actions if isinstance(action, m.Assign) and action.request == number]

    def times(self, number: int) -> list[float]:
        """When each of its tokens comes: from an assignment on, prefill and decoding go on until it ends or is interrupted."""
        if number not in self._times:
            self._times[number] = self._find_times(number)
        return self._times[number]

    def _find_times(self, number: int) -> list[float]:
        asked, times, began = self._trace[number], list[float](), inf
        prefill = decode = 0.0

        def until(end: float) -> None:
            first = began + prefill * (asked.input_tokens + len(times))
            times.extend(at for place in range(1, asked.output_tokens - len(times) + 1) if (at := first + place * decode) <= end + 1e-9)

        for record in self.records:
            event = record.event
            if isinstance(event, m.ModelDeployed) and event.model.name == asked.model and record.now <= asked.arrival_seconds:
                prefill, decode = event.model.prefill_seconds_per_token, event.model.decode_seconds_per_token
            elif isinstance(event, m.RequestProgressed | m.RequestFinished | m.RequestCancelled) and event.request == number and began < inf:
                until(record.now)
                began = inf
                if isinstance(event, m.RequestFinished):  # what a move held back
                    times.extend([record.now] * (asked.output_tokens - len(times)))
            for action in record.actions:
                if isinstance(action, m.Assign) and action.request == number:
                    began = record.now
                elif isinstance(action, m.Preempt) and action.request == number:
                    until(record.now)
                    began = inf
        return times

    def start_of(self, row: RequestRow) -> tuple[Tier | None, float]:
        """Where the start that it waited for read the weights, and for how long."""
        if row.warmth == Warmth.READY:
            return None, 0.0
        reached = [
            record.event for record in self.records if isinstance(record.event, m.InstanceReached) and record.event.instance == row.instance and record.now <= row.start
        ]  # fmt: skip
        return (reached[-1].tier, reached[-1].load_seconds or 0.0) if reached else (None, 0.0)

    def reason(self, number: int) -> str:
        """Why it was refused."""
        refused = (action.reason for record in self.records for action in record.actions if isinstance(action, m.Refuse) and action.request == number)
        return next(refused, "")
