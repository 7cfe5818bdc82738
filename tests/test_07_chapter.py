"""Chapter 07: a text that travels, processes that die where they are told to, what is predicted, compared, drawn and said."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sllm_mini.checkpoint import Checkpoint, convert_checkpoint
from sllm_mini.inference import Engine
from sllm_mini.inference.migration import Mode, Phase, Report, Speeds
from sllm_mini.inference.ownership.ledger import LedgerPiece
from sllm_mini.inference.sampler import SamplingOptions
from sllm_mini.inference.workers import WorkerOptions, Workers
from sllm_mini.lab.moving import crossing, dying, exact, parts, plots, retry, session_view, trace_plots
from sllm_mini.lab.moving.document import MODES, Move, assemble
from sllm_mini.lab.moving.journey import Journey, Told, journey_text, travel
from sllm_mini.lab.moving.measure import Trace
from sllm_mini.lab.moving.parts import Parts, predict
from sllm_mini.resources import resource
from sllm_mini.types import Epoch

pytestmark = pytest.mark.usefixtures("one_torch_thread")
PROMPT, SAMPLING = "Once upon a time", SamplingOptions(temperature=0.8, seed=2)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return convert_checkpoint(resource("data/models/tiny"), tmp_path_factory.mktemp("moving") / "tiny")


# --- a text that travels -----------------------------------------------------------------------------------------------


def test_a_text_is_the_same_whoever_writes_it_and_whoever_dies(tiny: Checkpoint) -> None:
    """Moved in the middle of a character of several bytes: once in peace, once by a source that dies there. The character is
    the story's last, so the text goes on past its end: else it could be over before the move is."""
    alone = list(Engine.load(tiny).generate(PROMPT, max_new_tokens=150, sampling=SAMPLING, stop_at_eos=False))
    half = next(number for number, piece in enumerate(alone, 1) if not piece.text)
    seen: list[int] = []
    with Workers(tiny.path, ["one", "two"], options=WorkerOptions(pace_seconds=0.02), program=dying.forked("two=sending:HandOver")) as workers:
        trips: list[tuple[str, str, Mode]] = [("one", "two", "tokens"), ("two", "one", "kv")]
        for source, to, mode in trips:
            found = travel(workers, source, PROMPT, {half: (to, mode)}, max_new_tokens=150, sampling=SAMPLING, stop_at_eos=False, watch=lambda so_far: seen.append(len(so_far.pieces)))
            assert found.token_ids == tuple(piece.token_id for piece in alone), source
            assert found.text == "".join(piece.text for piece in alone) and found.problem is None and found.finish == "length"
            assert list(found.owners.values()) == [source, to] and found.pieces[half].epoch >= 1
            if source == "one":
                assert found.moves[0] is not None and found.moves[0].outcome == "moved"
            else:
                assert found.moves == (None,) and workers.names == ("one",)
    assert seen == [*range(1, len(alone) + 1)] * 2


def piece(position: int, epoch: int, text: str = "a", arrived: float = 0.0) -> LedgerPiece:
    return LedgerPiece(position, 7, text, Epoch(epoch), arrived)


def test_a_stream_that_is_not_whole_is_told() -> None:
    def of(*pieces: LedgerPiece) -> Journey:
        return Journey("p", pieces, {1: "one", 2: "<two>"})

    whole = of(piece(4, 1, "a<", 0.0), piece(5, 1, "", 1.0), piece(6, 2, "é", 4.0), piece(7, 2, "b", 5.0))
    assert whole.problem is None and (whole.step_seconds, whole.stall_seconds) == (1.0, 3.0)
    assert "4 tokens by one (epoch 1), then <two> (epoch 2): no gap" in journey_text(whole) and "3.0 times that" in journey_text(whole)
    assert repr(Told(whole)) == "p [one, epoch 1]a< [<two>, epoch 2]éb"
    page = Told(whole)._repr_html_()
    assert "a&lt;</span>" in page and "&lt;two&gt;, epoch 2" in page and page.count("background:") == 4
    assert "follow" in str(of(piece(4, 1), piece(6, 1)).problem) and "follow" in str(of(piece(4, 1), piece(4, 1)).problem)
    assert "over" in str(of(piece(4, 2), piece(5, 1)).problem) and "broken" in str(of(piece(4, 1, "\ufffd")).problem)


def test_only_a_moment_of_a_move_can_be_named() -> None:
    assert dying.death("one=sent:HandOver") == ("one", "sent", "HandOver")
    for wrong in ("one", "=sent:HandOver", "one=after:HandOver", "one=sent:Nothing"):
        with pytest.raises(ValueError, match="moment:message"):
            dying.death(wrong)


# --- a session, and what is predicted ----------------------------------------------------------------------------------


def test_a_session_is_laid_out_field_by_field(tiny: Checkpoint) -> None:
    engine = Engine.load(tiny)
    generation = engine.generate(PROMPT, max_new_tokens=40, sampling=SAMPLING)
    for _ in range(6):
        next(generation)
    session = generation.session()
    table = session_view.session_table(session)
    assert {row[0] for row in table.rows} == set(session_view._MEANINGS) and f"{len(session.token_ids)} ids" in str(table)
    sizes = {row[0]: row[1:] for row in session_view.size_table(session, 1000).rows}
    assert sizes["KV cache"] == (f"{len(session.token_ids) - 1:.1f} kB", f"{len(session.token_ids) - 1} tokens of 1.00 kB")


PARTS = Parts(0.02, Speeds(1000.0, 1e9, 16_000), 200, 2.0, 0.03)


def test_a_prediction_is_made_of_the_parts() -> None:
    tokens, kv, stopped = (predict(PARTS, mode, 1000) for mode in MODES)
    assert tokens.nbytes == 2 * 2200 + 4000 and tokens.seconds == 1.0 and tokens.pause_steps == 1.5
    assert kv.nbytes == stopped.nbytes == 2 * 2200 + 16e6 and kv.seconds == stopped.seconds == pytest.approx(0.016)
    assert kv.pause_steps == pytest.approx(1 + 4 * 16e-6 / 0.02) and stopped.pause_steps == pytest.approx(1 + 0.016 / 0.02)
    assert predict(PARTS, "kv", 2).pause_steps == predict(PARTS, "stop_and_copy", 2).pause_steps, "the gap is no longer than the context"


def test_the_parts_are_measured(tiny: Checkpoint) -> None:
    found = parts.measure_parts(tiny, tokens=40)
    assert found.speeds.kv_nbytes_per_token == 6 * 2 * 2 * 32 * 4 and 1 <= found.session_nbytes_per_token <= 5
    assert min(found.step_seconds, found.gap_seconds, found.speeds.recompute_tokens_per_second, found.speeds.link_bytes_per_second) > 0


def test_a_retry_costs_what_is_computed_again() -> None:
    found = retry.losses(context=1000, said=100, pause_seconds=0.1, recompute_tokens_per_second=500, step_seconds=0.01, start_seconds=5)
    assert [one.seconds for one in found] == pytest.approx([0.1, 2.21, 3.01, 8.01])
    assert [row[2] for row in retry.losses_table(found).rows] == ["x1", "x22", "x30", "x80"]


# --- what is exact -----------------------------------------------------------------------------------------------------


def test_a_copied_cache_gives_equal_logits_and_a_recomputed_one_equal_tokens_up_to_ties(tiny: Checkpoint) -> None:
    runs = [run for dtype in ("float32", "bfloat16") for run in exact.compare_ways(tiny, [PROMPT], dtype=dtype, new_tokens=24)]
    assert [(run.dtype, run.way) for run in runs] == [(dtype, way) for dtype in ("float32", "bfloat16") for way in exact.WAYS]
    for run in runs:
        assert len(run.places) == 23
        if run.way == "copied":
            assert run.kv_equal and all(place.changed == 0 and place.margin == place.lead for place in run.places)
        for place in run.differing:
            assert place.margin - place.lead >= place.margin, "only a lead that was lost"
    assert not runs[1].kv_equal and any(place.changed for place in runs[1].places), "else this test compares nothing"


def test_tokens_that_differ_are_said_with_their_margins() -> None:
    places = tuple(exact.Place(at, margin, lead, 3, lead < 0) for at, (margin, lead) in enumerate([(4.0, 3.9), (0.5, -0.1), (0.0, 0.0), (0.25, -0.25)]))
    run = exact.Compared("bfloat16", "recomputed", places, False)
    assert [place.margin for place in run.differing] == [0.25, 0.5]
    assert "2 of 4 tokens differ, where the best led by 0.25, 0.5." in exact.compared_text([run])
    assert exact.compared_table([run]).rows[0][2:] == ("no", "0 of 4", "2", "0.5", "3")
    panel = exact.plot_margins([run]).axes[0]
    assert "2 of 4 differ" in panel.get_title(loc="left") and [len(line.get_xdata()) for line in panel.lines] == [2, 2, 2]  # type: ignore[arg-type]


# --- what is drawn and said --------------------------------------------------------------------------------------------


def trace(mode: Mode = "kv") -> Trace:
    """Steps of 10 ms, then a pause of 25 ms from step to step in which 5 are sent; the client sees 30."""
    before = [piece(100 + n, 1, arrived=n * 0.01) for n in range(8)]
    after = [piece(108 + n, 2, arrived=0.1 + n * 0.01) for n in range(3)]
    phases = [Phase("begin", 0.045, 0.046, 0, 300), Phase("round", 0.046, 0.06, 100, 1600), Phase("stop", 0.07, 0.071), Phase("hand over", 0.071, 0.08, 2, 332), Phase("resume", 0.08, 0.096)]
    report = Report("r", mode, "moved", "two", 2, "", phases, 0.07, 0.095)
    return Trace(mode, 100, (*before, *after), report, 0.045, 0.05, 0.025)


def test_a_pause_is_the_one_that_is_drawn() -> None:
    one = trace()
    assert one.step_seconds == pytest.approx(0.01) and one.gap_seconds == pytest.approx(0.03) and one.pause_seconds == pytest.approx(0.025)
    figure = trace_plots.plot_intervals([one, trace("tokens")])
    assert [text.get_text() for text in figure.axes[0].texts] == ["3.0 steps"]
    drawn = [np.asarray(line.get_xdata()).tolist() for line in figure.axes[0].lines if line.get_marker() in ("o", "s")]
    assert drawn == [[2, 3, 4, 5, 6, 7, 8], [9, 10, 11]]
    said = trace_plots.traces_text([one])
    assert said.startswith("A step before the moves takes 10.0 ms (10.0 ms to 10.0 ms in the 1 requests). KV cache: 30.0 ms between the last token from the source")
    assert said.endswith("the first from the destination (x3.0), before that 3 tokens while it moved, after x1.0 of a step as a rule and x1.0 at most.")
    assert trace_plots.phases_text([one]) == "KV cache: 25.0 ms, 2.5 steps."
    rows = trace_plots.phases_table([one]).rows
    assert [row[5] for row in rows] == ["the source", "the source", "nobody", "nobody", "the destination"]
    assert [text.get_text() for text in trace_plots.plot_phases([one]).texts] == [" 25.0 ms, 2.5 steps"]


def test_all_moves_of_a_figure_are_said_in_one_step() -> None:
    """Their own steps differ by scatter alone, which is told; nothing is divided by it."""
    one = trace()
    slow = replace(one, mode="tokens", pieces=tuple(replace(piece, arrived=4 * piece.arrived) for piece in one.pieces), started=0.18)
    traces = [one, slow, one]
    assert slow.step_seconds == pytest.approx(0.04) and trace_plots.step_of(traces) == pytest.approx(0.01)
    said = trace_plots.traces_text(traces)
    assert "10.0 ms (10.0 ms to 40.0 ms in the 3 requests)" in said and "120 ms between" in said and "(x12.0)" in said and "after x4.0 of a step" in said
    drawn = [text.get_text() for ax in trace_plots.plot_intervals(traces).axes for text in ax.texts]
    assert drawn == ["3.0 steps", "12.0 steps", "3.0 steps"]


def document() -> dict[str, Any]:
    steps_of: dict[Mode, float] = {"tokens": 2.0, "kv": 1.5, "stop_and_copy": 5.0}
    moves = [
        Move(mode, context, context / 100, 0.01 * steps, 0.02, 0.01, context * 20, 1, context, context / 500, context, context * 16_000, context / 1e5)
        for mode, steps in steps_of.items()
        for context in (100, 1000)
    ]
    return assemble(moves, {})


def test_moves_are_said_as_they_are_drawn() -> None:
    found, predicted = document(), plots.predictions(PARTS, (100, 1000))
    assert "stop and copy 20.0 kB and a pause of 5.0 steps (5.0 to 5.0)" in plots.moves_text(found)
    figure = plots.plot_moves(found, predicted)
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["bytes sent", "ms for the whole move", "pause in decode steps"]
    drawn = [container.lines[0].get_ydata().tolist() for container in figure.axes[2].containers]  # type: ignore[attr-defined]
    assert drawn == [pytest.approx([2.0, 2.0]), pytest.approx([1.5, 1.5]), pytest.approx([5.0, 5.0])]
    rows = plots.moves_table(found, predicted).rows
    assert len(rows) == 6 and rows[0][8] == "500 tokens/s" and rows[5][8] == "1.60 GB/s" and rows[1][6] == "1.50"


def test_the_crossing_is_where_the_baseline_becomes_the_longer_pause() -> None:
    assert parts.crossing(PARTS, "tokens") == pytest.approx((0.03 - 0.02) * 1e9 / 16_000) and parts.crossing(PARTS, "kv") == 4
    at = parts.crossing(PARTS, "tokens")
    for context, longer in ((at - 1, False), (at + 1, True)):
        assert (predict(PARTS, "stop_and_copy", context).pause_steps > predict(PARTS, "tokens", context).pause_steps) == longer  # type: ignore[arg-type]

    def found(*pauses: tuple[float, ...]) -> dict[str, Any]:
        """For each context of 100, 200, … the samples of stop and copy; the tokens took 1.9 to 2.1 steps, the cache 1.5."""
        waits: tuple[tuple[Mode, tuple[float, ...]], ...] = (("tokens", (1.9, 2.1)), ("kv", (1.5, 1.5)))
        moves = [
            Move(mode, 100 * number, 1.0, 0.01 * steps, 0.02, 0.01, 1, 1, 1, 1.0, 1, 1, 1.0)
            for number, baseline in enumerate(pauses, 1)
            for mode, samples in (*waits, ("stop_and_copy", baseline))
            for steps in samples
        ]  # fmt: skip
        return assemble(moves, {})

    crossed = found((1.2, 1.4), (1.8, 2.0), (3.0, 3.2))
    assert crossing.differences(crossed, "tokens") == {100: (pytest.approx(-0.7), True), 200: (pytest.approx(-0.1), False), 300: (pytest.approx(1.1), True)}
    said = crossing.crossing_text(crossed, PARTS)
    assert "Against tokens, stop and copy was to become the longer pause at 625 tokens of context; measured, it does so between 200 and 300 tokens." in said
    assert "Against KV cache, stop and copy was to become the longer pause at 4 tokens of context; measured, it does so between 100 and 200 tokens." in said
    assert [row[1:] for row in crossing.crossing_table(crossed).rows] == [("-0.70", "-0.10 (ranges overlap)", "+1.10"), ("-0.20", "+0.40", "+1.60")]
    assert "not up to 200 tokens" in crossing.crossing_text(found((1.0, 1.0), (1.1, 1.1)), PARTS)
    assert "from 100 tokens, the shortest context here" in crossing.crossing_text(found((3.0, 3.0), (4.0, 4.0)), PARTS)
    assert "it was longer at 100 tokens only, which is scatter" in crossing.crossing_text(found((2.2, 2.2), (1.0, 1.0)), PARTS)


def test_the_break_even_is_where_the_lines_meet() -> None:
    speeds = Speeds(5000, 1e9, 25_000)  # 125 MB/s: 1 Gbit/s
    axes = plots.plot_break_even(speeds)
    marks = {str(line.get_label()).split(",")[0]: line for line in axes.lines if line.get_marker() in ("D", "s")}
    assert marks["break-even"].get_xdata()[0] == pytest.approx(1.0) and marks["this link"].get_xdata()[0] == pytest.approx(8.0)  # type: ignore[index]
    said = plots.break_even_text(speeds)
    assert "125 MB/s, or 1 Gbit/s" in said and "1 Gbit/s tokens, 10 Gbit/s kv, 100 Gbit/s kv; this link, 8 Gbit/s, kv" in said
    assert plots.draw_break_even(8, 5000, 25).caption == said
    table = plots.recompute_speeds_table({"m": {"num_hidden_layers": 10, "num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 400}})
    assert table.rows[0][1:3] == ("4.00 kB", "31,250 tokens/s")


def test_the_chapter_types_in_no_measurement() -> None:
    """What the prose says in numbers are settings of its cells; results stand in outputs alone."""
    import nbformat

    path = next((Path(__file__).parents[1] / "chapters").glob("07_*.ipynb"))
    cells = nbformat.read(path, as_version=4).cells
    assert [cell.id for cell in cells] == [f"c07-{number:02d}" for number in range(len(cells))]
    prose = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    assert "**Predict**" in prose and os.sep + "work" not in prose
