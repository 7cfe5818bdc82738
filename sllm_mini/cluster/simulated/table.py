"""One row per request, as columns of numbers: 104 bytes each, summed up and let go where no rows are kept.

Taught in chapter 08. The driver packs thirteen numbers per request; all else happens for 8 192 rows at once, in numpy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from struct import Struct as Packing
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from sllm_mini.cluster.simulated.summary import (
    BUCKETS,
    Counters,
    ModelSummary,
    Spread,
    bucket_counts,
    bucket_of,
    exact_spread,
)
from sllm_mini.types import Warmth

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Rows = NDArray[np.float64]

COLUMNS = (
    "request", "model", "arrived", "start", "first_token", "end", "input_tokens", "output_tokens", "warmth", "migrations", "preemptions", "instance", "outcome",
)  # fmt: skip
WIDTH = len(COLUMNS)
_ROW = Packing(f"{WIDTH}d")
pack_row = _ROW.pack
"""The numbers of a row as bytes, in the order of `COLUMNS`."""
ROW_NBYTES = _ROW.size
CHUNK_ROWS = 8_192
ANSWERED, REFUSED, CANCELLED = range(3)
OUTCOMES = ("answered", "refused", "cancelled")
_MODEL, _ARRIVED, _START, _FIRST, _END, _WARMTH, _OUTCOME = 1, 2, 3, 4, 5, 8, 12


class RequestRow(Struct, frozen=True, gc=False):
    """What became of a request. `start` is its first assignment; `warmth` how warm the instance was whose start began after
    it came and which it waited for: READY if it waited for none. Times are NaN where it never came so far."""

    request: int
    model: str
    arrived: float
    start: float
    first_token: float
    end: float
    input_tokens: int
    output_tokens: int
    warmth: Warmth
    migrations: int
    preemptions: int
    instance: int
    outcome: str

    @property
    def wait_seconds(self) -> float:
        return self.start - self.arrived

    @property
    def first_token_seconds(self) -> float:
        return self.first_token - self.arrived

    @property
    def latency_seconds(self) -> float:
        return self.end - self.arrived


class RequestTable:
    """The rows of a run in order of their end (`keep`), and in any case what they amount to.

    Iterate for `RequestRow`s, or take `column("end")`, a numpy array. A row is appended to `buffer` by `pack_row`, and
    `settle` is called now and then. One thread at a time.
    """

    def __init__(self, models: Sequence[str], *, keep: bool) -> None:
        self.models = list(models)
        self.kept = keep
        self.buffer = bytearray()
        self._chunks: list[bytearray] = []
        self._outcomes = [0, 0, 0]
        self._streams = (Counters(), Counters(), Counters())
        self._model_streams = _ModelStreams()
        self.cold = [0] * len(Warmth)
        """Answered requests by the warmth their start climbed from."""

    def settle(self) -> None:
        """Sums up what is in the buffer and empties it."""
        rows = _matrix(self.buffer)
        for outcome in (ANSWERED, REFUSED, CANCELLED):
            self._outcomes[outcome] += int((rows[:, _OUTCOME] == outcome).sum())
        answered = rows[rows[:, _OUTCOME] == ANSWERED]
        for warmth in Warmth:
            self.cold[warmth] += int((answered[:, _WARMTH] == warmth).sum())
        if self.kept:
            self._chunks.append(self.buffer)
        else:
            for stream, numbers in zip(self._streams, _measures(answered), strict=True):
                stream.add(numbers)
            self._model_streams.add(rows, len(self.models))
        self.buffer = bytearray()

    def __len__(self) -> int:
        """Requests that are answered, refused or cancelled, kept or not."""
        return sum(self._outcomes)

    def count(self, outcome: str) -> int:
        return self._outcomes[OUTCOMES.index(outcome)]

    def __iter__(self) -> Iterator[RequestRow]:
        for chunk in self._chunks:
            for number, model, arrived, start, first, end, inputs, outputs, warmth, moves, preempted, instance, outcome in _ROW.iter_unpack(chunk):
                yield RequestRow(
                    int(number), self.models[int(model)] if model >= 0 else "", arrived, start, first, end, int(inputs), int(outputs), Warmth(int(warmth)),
                    int(moves), int(preempted), int(instance), OUTCOMES[int(outcome)],
                )  # fmt: skip

    def column(self, name: str) -> Rows:
        """One column of the kept rows. Raises ValueError for another name."""
        return self._rows()[:, COLUMNS.index(name)]

    def spreads(self) -> dict[str, Spread]:
        """Seconds from arrival to the assignment, the first token and the end, of answered requests."""
        names = ("wait", "first_token", "latency")
        if not self.kept:
            return {name: stream.spread() for name, stream in zip(names, self._streams, strict=True)}
        rows = self._rows()
        answered = rows[rows[:, _OUTCOME] == ANSWERED]
        return {name: exact_spread(numbers) for name, numbers in zip(names, _measures(answered), strict=True)}

    def by_model(self) -> list[ModelSummary]:
        """One summary per model that had requests, in the order of models."""
        if not self.kept:
            return self._model_streams.summaries(self.models)
        return [_exact(self.models[model], mine) for model, mine in _by_model(self._rows())]

    def _rows(self) -> Rows:
        import numpy as np

        return np.concatenate([_matrix(chunk) for chunk in self._chunks]) if self._chunks else _matrix(bytearray())


def _matrix(rows: bytearray) -> Rows:
    import numpy as np

    return np.frombuffer(rows, dtype=np.float64).reshape(-1, WIDTH)


def _measures(answered: Rows) -> tuple[Rows, Rows, Rows]:
    arrived = answered[:, _ARRIVED]
    return answered[:, _START] - arrived, answered[:, _FIRST] - arrived, answered[:, _END] - arrived


def _by_model(rows: Rows) -> Iterator[tuple[int, Rows]]:
    import numpy as np

    rows = rows[rows[:, _MODEL] >= 0]
    rows = rows[np.argsort(rows[:, _MODEL], kind="stable")]
    models, begins = np.unique(rows[:, _MODEL], return_index=True)
    ends = [*begins[1:], len(rows)][: len(begins)]
    for model, begin, end in zip(models, begins, ends, strict=True):
        yield int(model), rows[begin:end]


def _exact(model: str, rows: Rows) -> ModelSummary:
    answered = rows[rows[:, _OUTCOME] == ANSWERED]
    wait, first, latency = _measures(answered)
    return ModelSummary(
        model, len(answered), int((rows[:, _OUTCOME] == REFUSED).sum()), int((answered[:, _WARMTH] < Warmth.READY).sum()),
        _mean(float(wait.sum()), len(answered)), _mean(float(latency.sum()), len(answered)), exact_spread(first),
    )  # fmt: skip


def _mean(total: float, count: int) -> float:
    return total / count if count else float("nan")


class _ModelStreams:
    """What is summed up of each model, for a whole chunk at a time however many models it is of."""

    __slots__ = ("_buckets", "_largest", "_sums")

    def __init__(self) -> None:
        self._sums: Any = None  # rows: answered, refused, cold, wait, latency, first token
        self._largest: Any = None
        self._buckets: dict[int, int] = {}

    def add(self, rows: Rows, models: int) -> None:
        import numpy as np

        rows = rows[rows[:, _MODEL] >= 0]
        if self._sums is None or self._sums.shape[1] < models:
            sums, largest = np.zeros((6, models)), np.full(models, -np.inf)
            if self._sums is not None:
                sums[:, : self._sums.shape[1]], largest[: len(self._largest)] = self._sums, self._largest
            self._sums, self._largest = sums, largest
        refused = rows[rows[:, _OUTCOME] == REFUSED]
        answered = rows[rows[:, _OUTCOME] == ANSWERED]
        of = answered[:, _MODEL].astype(np.int64)
        wait, first, latency = _measures(answered)
        weights = (None, answered[:, _WARMTH] < Warmth.READY, wait, latency, first)
        for place, weight in zip((0, 2, 3, 4, 5), weights, strict=True):
            self._sums[place] += np.bincount(of, weights=weight, minlength=self._sums.shape[1])
        self._sums[1] += np.bincount(refused[:, _MODEL].astype(np.int64), minlength=self._sums.shape[1])
        np.maximum.at(self._largest, of, first)
        for key, number in zip(*bucket_counts(of * BUCKETS + bucket_of(first)), strict=True):
            self._buckets[key] = self._buckets.get(key, 0) + number

    def summaries(self, models: Sequence[str]) -> list[ModelSummary]:
        found = []
        buckets: dict[int, dict[int, int]] = {}
        for key, number in self._buckets.items():
            buckets.setdefault(key // BUCKETS, {})[key % BUCKETS] = number
        columns = enumerate(self._sums.T.tolist()) if self._sums is not None else ()
        for model, (answered, refused, cold, wait, latency, first) in columns:
            if answered or refused:
                spread = Counters(int(answered), first, float(self._largest[model]), buckets.get(model, {})).spread()
                found.append(
                    ModelSummary(models[model], int(answered), int(refused), int(cold), _mean(wait, int(answered)), _mean(latency, int(answered)), spread)
                )
        return found
