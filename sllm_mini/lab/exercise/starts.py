"""What the last cell of each assignment runs and draws: the whole package, small, on the student's function and on its own.

A `run_…` returns data and draws nothing; its `draw_…(own, theirs)` shows both in a notebook. Each takes some seconds at most. Runs
of the tiny model are real, those of clusters in simulated time. Used with `Exercise.show`, which runs in a child; `prepare` comes before it.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

from sllm_mini.checkpoint import Checkpoint, convert_checkpoint
from sllm_mini.cluster.simulated import SimulationOptions, SimulationResult, simulate
from sllm_mini.cluster.trace import TraceRequest
from sllm_mini.control.keepalive import FixedKeepAlive
from sllm_mini.control.multicast import Plan, binomial_pipeline, check, summarize
from sllm_mini.eviction import GDSF
from sllm_mini.inference import Engine, stream_model
from sllm_mini.inference.migration import MigrationServer, migrate
from sllm_mini.inference.migration.messages import Report
from sllm_mini.inference.ownership import EpochRegister, TokenFeed, TokenLedger
from sllm_mini.inference.session import Session
from sllm_mini.lab.coldstart import import_model_class
from sllm_mini.lab.figure import Described, describe
from sllm_mini.lab.keeping.contenders import Outcome
from sllm_mini.lab.keeping.life import lives, lives_text, plot_lives
from sllm_mini.lab.models import tiny_checkpoint
from sllm_mini.lab.multicast_plots import plot_schedule, schedule_text
from sllm_mini.lab.scheduling.gantt import gantt_alt_text, plot_gantts
from sllm_mini.lab.scheduling.worked import GB, llm, machine, small_burst
from sllm_mini.lab.timeline import plot_timeline, timeline_alt_text
from sllm_mini.loading import LoadOptions, start_load
from sllm_mini.resources import resource
from sllm_mini.types import Span, SpanRecorder

OWN, THEIRS = "the package's own", "yours"
_PROMPT = tuple(range(5, 205))
_SMALL = LoadOptions(chunk_nbytes=2 << 20, threads=1)


def prepare() -> None:
    """Imports here what every child would import again, some seconds each."""
    import_model_class(resource("data/models/tiny"))


def run_layout() -> list[Span]:
    """The tiny model is converted anew, and started while its bytes arrive."""
    with tempfile.TemporaryDirectory() as folder:
        return _started(convert_checkpoint(resource("data/models/tiny"), Path(folder) / "tiny"))


def run_start() -> list[Span]:
    """The tiny model, started while its bytes arrive in chunks of 2 MiB, one read at a time."""
    return _started(tiny_checkpoint())


def _started(checkpoint: Checkpoint) -> list[Span]:
    recorder = SpanRecorder()
    with start_load(checkpoint, options=_SMALL, recorder=recorder) as loading:
        streamed = stream_model(loading, recorder=recorder)
        with recorder.span("first token", lane="request"):
            next(Engine(streamed.model).generate(_PROMPT, max_new_tokens=1))
        streamed.wait()
    begin = min(span.start for span in recorder.spans)
    return [Span(span.name, span.start - begin, span.end - begin, span.lane, span.nbytes, span.warmth) for span in recorder.spans]


def draw_starts(own: Sequence[Span], theirs: Sequence[Span]) -> None:
    """Two starts as timelines, one clock."""
    alt = timeline_alt_text(theirs, what=f"A start with {THEIRS}") + " " + timeline_alt_text(own, what=f"With {OWN}")
    _show(describe(plot_timeline(theirs, title="A cold start of the tiny model", label=THEIRS, recorded=own, recorded_label=OWN), alt))


def run_eviction() -> SimulationResult:
    """Ten models of 13 to 52 GB, a disk that holds five of them, 60 requests: who is thrown out is fetched again over the network."""
    models = [llm(f"m{number}", size * GB, seconds_per_token=0.02) for number, size in enumerate((13, 26, 52, 13, 26, 52, 13, 26, 52, 13))]
    order = [0, 3, 1, 0, 6, 2, 0, 3, 4, 0, 9, 5, 0, 3, 7, 1, 0, 8, 3, 6] * 3
    trace = [TraceRequest(60.0 * number, f"m{model}", 100, 50) for number, model in enumerate(order)]
    options = SimulationOptions(store_disk_nbytes=100 * GB, eviction=GDSF)
    return simulate(trace, [machine("one")], models, placement="serverlessllm", keep_alive=FixedKeepAlive(5.0), options=options)


def draw_waits(own: SimulationResult, theirs: SimulationResult) -> None:
    """For each share of the requests, the seconds within which they had their first token."""
    from matplotlib import pyplot

    from sllm_mini.lab.style import color_of, use_style

    use_style()
    figure, ax = pyplot.subplots(figsize=(7.2, 3.0), layout="constrained")
    words = []
    for result, name, role, line in ((own, OWN, "disk", "--"), (theirs, THEIRS, "ready", "-")):
        waits = sorted(row.first_token_seconds for row in result.requests)
        ax.step(waits, [100 * (number + 1) / len(waits) for number in range(len(waits))], where="post", color=color_of(role), linestyle=line, label=name)
        words.append(f"with {name} half of {len(waits)} requests had their first token within {waits[len(waits) // 2]:.1f} s, nine of ten within {waits[len(waits) * 9 // 10]:.1f} s")
    ax.set_xlabel("seconds from request to first token (simulated)")
    ax.set_ylabel("requests (%)")
    ax.legend()
    _show(describe(figure, "; ".join(words) + ".", caption="; ".join(words) + "."))


def run_move() -> Report:
    """One text of the tiny model moves between two engines of this process while it is written, by rounds of tokens."""
    checkpoint = tiny_checkpoint()
    engines = {name: Engine.load(checkpoint) for name in ("source", "destination")}
    register = EpochRegister()
    ledger = TokenLedger(register)
    feeds = {name: TokenFeed(engine, ledger) for name, engine in engines.items()}
    session = Session("request", engines["source"].name, _PROMPT, len(_PROMPT), 120)
    epoch = register.claim("request", "source", 0)
    if epoch is None:
        raise ValueError("a register that is new has no owner for a request")
    ledger.open(session)
    feeds["source"].adopt(session, epoch)
    over = threading.Event()

    def step(engine: Engine) -> None:
        while not over.is_set():
            if not engine.step():
                over.wait(0.001)

    threads = [threading.Thread(target=step, args=(engine,), daemon=True) for engine in engines.values()]
    with tempfile.TemporaryDirectory() as folder, MigrationServer(f"{folder}/move", owner="destination", register=register, feed=feeds["destination"]) as server:
        for thread in threads:
            thread.start()
        pieces = ledger.stream("request")
        for _ in range(10):
            next(pieces)
        report = migrate(engines["source"], "request", server.address, owner="source", register=register, feed=feeds["source"])
        over.set()
        for thread in threads:
            thread.join()
    for feed in feeds.values():
        feed.close()
    return report


def draw_moves(own: Report, theirs: Report) -> None:
    """The phases of both moves, the rounds while the source decodes on and the pause."""
    words = []
    for report, name in ((own, OWN), (theirs, THEIRS)):
        pause = "" if report.pause_seconds is None else f", a pause of {report.pause_seconds * 1e3:.1f} ms for its reader"
        words.append(f"With {name} the text {report.outcome} after {report.rounds} rounds{pause}.")
    ax = plot_timeline(_phases(theirs), title="A text moves", label=THEIRS, recorded=_phases(own), recorded_label=OWN)
    _show(describe(ax, " ".join(words), caption=" ".join(words)))


def _phases(report: Report) -> list[Span]:
    begin = report.phases[0].start
    return [Span(phase.name, phase.start - begin, phase.end - begin, "move", phase.nbytes) for phase in report.phases]


def run_placement() -> SimulationResult:
    """Ten requests for four models on three machines, in ServerlessLLM's way."""
    return small_burst("serverlessllm")


def draw_placements(own: SimulationResult, theirs: SimulationResult) -> None:
    """Both bursts as Gantt charts of the machines."""
    results = {OWN: own, THEIRS: theirs}
    _show(describe(plot_gantts(results), gantt_alt_text(results)))


def run_lives() -> Outcome:
    """One function's calls over some hours, RainbowCake deciding which layers of it stay."""
    return lives(("RainbowCake",))["RainbowCake"]


def draw_lives(own: Outcome, theirs: Outcome) -> None:
    """How warm the function was over time, and who waited for a start."""
    outcomes = {OWN: own, THEIRS: theirs}
    _show(describe(plot_lives(outcomes), f"How warm one function was over time, a row for each. {lives_text(outcomes)}", caption=lives_text(outcomes)))


def run_multicast() -> Plan:
    """One node sends a model of eight blocks to seven others. Raises ValueError for a plan that breaks a rule."""
    plan = binomial_pipeline(8, 8)
    check(plan)
    return plan


def draw_multicast(own: Plan, theirs: Plan) -> None:
    """The schedule that the student's step makes, and how long the package's own takes."""
    said = f"{schedule_text(theirs)} With {OWN} step: {summarize(own).ticks} ticks."
    _show(describe(plot_schedule(theirs), said, caption=said))


def _show(described: Described) -> None:
    from IPython.display import display

    display(described)
