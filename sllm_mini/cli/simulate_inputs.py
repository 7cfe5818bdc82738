"""What `sllm-mini simulate` runs: traces by name, models and nodes from files, or equal ones made from its options."""

from __future__ import annotations

import difflib
import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from sllm_mini.errors import FormatError

if TYPE_CHECKING:
    from sllm_mini.cluster.trace import Trace, TraceRequest
    from sllm_mini.control.messages import ModelSpec, NodeSpec

    Spec = TypeVar("Spec", ModelSpec, NodeSpec)

_NAMED = 3
"""So many models are named in one sentence."""


def nearest(word: str, known: Iterable[str]) -> str:
    """ "; did you mean burst?" where something known is written much like it, else ""."""
    found = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {found[0]}?" if found else ""


def open_named(name: str) -> Trace:
    """The trace in a file, or the one of that name that travels with sllm_mini; a file comes first. Raises FormatError."""
    from sllm_mini.cluster.trace import open_trace, shipped_trace
    from sllm_mini.cluster.trace.shipped import SHIPPED

    if Path(name).exists():
        return open_trace(name)
    if name in SHIPPED:
        return shipped_trace(name)
    raise FormatError(f"there is no such file, and no trace of that name travels with sllm_mini ({', '.join(SHIPPED)}){nearest(name, SHIPPED)}", path=name)


def merged(traces: Sequence[Trace]) -> Iterator[TraceRequest]:
    """All their requests by time."""
    return iter(traces[0]) if len(traces) == 1 else heapq.merge(*traces, key=lambda request: request.arrival_seconds)


@dataclass(frozen=True, slots=True)
class Asked:
    """Who is asked for in traces, in order of the first request, and how many requests there are. `functions` are those whose
    requests have no tokens, as in traces of functions; most say how long they run."""

    names: tuple[str, ...]
    functions: frozenset[str]
    requests: int

    @property
    def noun(self) -> str:
        return "function" if len(self.functions) == len(self.names) > 0 else "model"


def asked_for(traces: Sequence[Trace]) -> Asked:
    """Runs through the traces once. Raises FormatError for a wrong line."""
    tokens: dict[str, int] = {}
    count = 0
    for request in merged(traces):
        tokens[request.model] = tokens.get(request.model, 0) + request.input_tokens + request.output_tokens
        count += 1
    return Asked(tuple(tokens), frozenset(name for name, total in tokens.items() if not total), count)


@dataclass(frozen=True, slots=True)
class Figures:
    """What every model, or every function, is taken for; all of them assumed."""

    nbytes: int
    devices: int
    start_seconds: float
    process_nbytes: int
    runtime_nbytes: int


MODEL = Figures(14 * 10**9, 1, 5.0, 10**8, 10**9)
FUNCTION = Figures(10**8, 0, 2.5, 2 * 10**6, 6 * 10**7)


def even_models(asked: Asked, *, nbytes: int | None, devices: int | None, start_seconds: float | None, min_instances: int, max_instances: int) -> list[ModelSpec]:
    """Equal models and equal functions; None: as `MODEL` and `FUNCTION` have it. A function named as those of the trace faas
    are, "java-03", shares the runtime of its language."""
    from sllm_mini.cluster.trace.workloads import FAAS_RUNTIMES
    from sllm_mini.control.messages import ModelSpec

    specs = []
    for name in asked.names:
        usual = FUNCTION if name in asked.functions else MODEL
        seconds = usual.start_seconds if start_seconds is None else start_seconds
        language = name.partition("-")[0]
        specs.append(
            ModelSpec(
                name=name, nbytes=usual.nbytes if nbytes is None else nbytes, devices=usual.devices if devices is None else devices, min_instances=min_instances,
                max_instances=max_instances, runtime=language if name in asked.functions and language in FAAS_RUNTIMES else "python", process_nbytes=usual.process_nbytes,
                runtime_nbytes=usual.runtime_nbytes, process_seconds=0.2 * seconds, runtime_seconds=0.6 * seconds, ready_seconds=0.2 * seconds,
                prefill_seconds_per_token=2e-4, decode_seconds_per_token=0.02,
            )
        )  # fmt: skip
    return specs


def read_specs(path: Path, kind: type[Spec]) -> list[Spec]:
    """A JSON list of models or nodes. Raises FormatError that names the entry for anything else, for a field that there is not,
    for a figure that cannot be and for a name that two have."""
    import msgspec

    what = kind.__name__.removesuffix("Spec").lower()
    try:
        entries = msgspec.json.decode(path.read_bytes())
    except msgspec.DecodeError as error:
        raise FormatError(f"it is no JSON list of {what}s ({error}); give an object for each with the fields of {kind.__name__}", path=path) from error
    if not isinstance(entries, list) or not entries:
        raise FormatError(f"it is no JSON list of {what}s; give an object for each, one at least, with the fields of {kind.__name__}", path=path)
    specs: dict[str, Spec] = {}
    for number, entry in enumerate(entries, 1):
        spec = _spec(path, kind, f"{what} {number}", entry)
        if spec.name in specs:
            raise FormatError(f"{what} {number} is named {spec.name!r} as one before it is; give each a name of its own", path=path)
        specs[spec.name] = spec
    return list(specs.values())


def _spec(path: Path, kind: type[Spec], which: str, entry: Any) -> Spec:
    import msgspec

    if not isinstance(entry, dict):
        raise FormatError(f"{which} is no object; give one with the fields of {kind.__name__}", path=path)
    fields = kind.__struct_fields__
    for field in entry:
        if field not in fields:
            raise FormatError(f"{which} has the field {field!r}, which {kind.__name__} has not{nearest(field, fields) or '; its fields are ' + ', '.join(fields)}", path=path)
    try:
        return msgspec.convert(entry, kind)
    except msgspec.ValidationError as error:
        raise FormatError(f"{which} is wrong: {error}", path=path) from error


def missing_text(asked: Asked, specs: Sequence[ModelSpec], path: Path) -> str | None:
    """A sentence where the trace asks for models that a file has not."""
    known = {spec.name for spec in specs}
    missing = [name for name in asked.names if name not in known]
    if not missing:
        return None
    more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
    return f"the trace asks for {', '.join(missing[:_NAMED])}{more}, which {path} has not; requests for what is not there are refused"
