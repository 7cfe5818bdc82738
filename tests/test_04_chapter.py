"""Chapter 04: which layer runs in which step, what is predicted from parts, what a picture and a sentence say of a run."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
import torch

from sllm_mini.checkpoint import Checkpoint, convert_checkpoint
from sllm_mini.errors import LoadCancelled, UnsupportedError
from sllm_mini.inference import stream_model
from sllm_mini.lab.bench.document import save_document
from sllm_mini.lab.figure import Described
from sllm_mini.lab.overlap import curve
from sllm_mini.lab.overlap.document import Series, assemble
from sllm_mini.lab.overlap.parts import Parts, measure_parts, phases, prompt_lengths, record_cold
from sllm_mini.lab.overlap.start import MODES, Layer, Mode, Sample, Start
from sllm_mini.lab.overlap.steps import HandedOut, Step, plot_steps, run_steps, steps_alt_text, steps_text
from sllm_mini.loading import load_model
from sllm_mini.resources import resource
from sllm_mini.types import Span

CHAPTER = next((Path(__file__).parents[1] / "chapters").glob("04_*.ipynb"))
PROMPT = [5, 17, 33, 2]
LAYERS = (Layer("embedding", 40), Layer("model.layers.0", 30), Layer("model.layers.1", 30), Layer("head", 0))
LAYER_SECONDS = (0.0, 1.0, 1.0, 0.0)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return convert_checkpoint(resource("data/models/tiny"), tmp_path_factory.mktemp("overlap") / "tiny")


# --- steps -------------------------------------------------------------------------------------------------------


def test_each_layer_runs_with_its_bytes_and_none_before_backwards(tiny: Checkpoint) -> None:
    threads, layers = set(threading.enumerate()), list(tiny.index.layers)
    expected = load_model(tiny)(input_ids=torch.tensor([PROMPT])).logits[0, -1]
    forward, logits = run_steps(tiny, layers, PROMPT)
    assert forward == [Step(layer, (layer,)) for layer in layers]
    assert torch.equal(logits, expected)
    backward, logits = run_steps(tiny, layers[::-1], PROMPT)
    assert [step.ran for step in backward] == [()] * (len(layers) - 1) + [tuple(layers)]
    assert torch.equal(logits, expected)
    assert not [thread.name for thread in set(threading.enumerate()) - threads if thread.name == "sllm-steps"]


def test_a_layer_that_came_early_runs_with_the_one_before_it(tiny: Checkpoint) -> None:
    layers = list(tiny.index.layers)
    swapped = [layers[1], layers[0], *layers[2:]]
    found, _ = run_steps(tiny, swapped, PROMPT)
    assert [step.ran for step in found[:3]] == [(), (layers[0], layers[1]), (layers[2],)]
    with pytest.raises(ValueError, match="each of the"):
        run_steps(tiny, layers[1:], PROMPT)


def test_a_load_that_ends_in_the_middle_fails_this_request_and_the_next(tiny: Checkpoint) -> None:
    loading = HandedOut(tiny)
    model = stream_model(loading).model
    for layer in loading.layers[:3]:
        loading.deliver(layer)
    loading.cancel()
    for _ in range(2):
        with pytest.raises(LoadCancelled):
            model(input_ids=torch.tensor([PROMPT]))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_steps_are_said_as_they_are_drawn() -> None:
    runs = {"in order": [Step("a", ("a",)), Step("b", ("b",))], "backwards": [Step("b", ()), Step("a", ("a", "b"))]}
    axes = plot_steps(runs)
    assert [len(panel.lines) for panel in axes.figure.axes] == [4, 4] and axes.get_title(loc="left") == "in order"
    text = steps_text(runs)
    assert "in order: the first layer runs after 1 of 2" in text and "backwards: the first layer runs after 2 of 2 layers have come, and 2 of them run only when the last has" in text
    assert "1: b comes, nothing runs; 2: a comes, a, b runs" in steps_alt_text(runs) and text in steps_alt_text(runs)
    with pytest.raises(ValueError, match="no steps"):
        plot_steps({})


# --- predictions ---------------------------------------------------------------------------------------------------


def parts(*, load: float = 10.0, cpu: float = 4.0, cores: int | None = 2) -> Parts:
    prefills = ((10, Sample(2.0, 2.0, 1)), (20, Sample(4.0, 4.0, 1)))
    return Parts(LAYERS, LAYER_SECONDS, Sample(load, cpu, None), prefills, cores)


def test_a_prediction_is_the_larger_bound() -> None:
    """Bytes of the embedding and both layers come after 4, 7 and 10 s; the last layer computes half of the prefill after that."""
    one = parts().predict(20)
    assert (one.load, one.prefill, one.serial) == (10.0, 4.0, 14.0)
    assert one.pipeline == pytest.approx(10 + 4 / 2) and one.work == pytest.approx((4 + 4) / 2)
    assert one.overlapped == one.pipeline
    assert parts(cpu=40.0).predict(20).overlapped == pytest.approx(22.0), "the cores"
    assert parts(cpu=40.0, cores=None).predict(20).work == 0.0
    late = replace(parts(), model_seconds=9.0)
    assert late.predict(20).overlapped == late.predict(20).pipeline == pytest.approx(13.0), "the module comes late"
    assert "begins with the module" in curve.predictions_text(late, [late.predict(20)])
    assert parts().embedding_share() == pytest.approx(0.4)


def test_prefills_lie_on_the_lines_between_those_measured() -> None:
    assert parts().prefill(15)[0] == pytest.approx(3.0) and parts().prefill(40)[0] == pytest.approx(8.0)
    assert parts().prefill(1)[0] == pytest.approx(1.0), "no less than half of the shortest"
    assert parts().balanced() == 50 and parts().balanced(most=30) == 30 and parts(load=0.1).balanced(least=24) == 24
    assert prompt_lengths(parts()) == (8, 100, 50) and prompt_lengths(parts(load=0.1))[-1] == 8
    with pytest.raises(ValueError, match="two or more"):
        Parts(LAYERS, LAYER_SECONDS, Sample(1, 1, None), ((5, Sample(1, 1, 1)),), 2)


def test_parts_are_measured_cold_and_predict(tiny: Checkpoint) -> None:
    try:
        found = measure_parts(tiny, (2, 9), rounds=1)
    except UnsupportedError as error:
        pytest.skip(f"nothing can be cold here: {error}")
    assert [tokens for tokens, _ in found.prefills] == [2, 9] and found.load.token_id is None
    assert all(sample.token_id is not None for _, sample in found.prefills) and min(found.layer_seconds) > 0 < found.model_seconds
    one = found.predict(5)
    assert max(one.load, one.prefill) <= one.overlapped and one.pipeline <= max(one.load, found.model_seconds) + one.prefill + 1e-9


def test_a_serial_start_in_phases(tiny: Checkpoint) -> None:
    try:
        start = record_cold(tiny, "serial", 5)
    except UnsupportedError as error:
        pytest.skip(f"nothing can be cold here: {error}")
    spans = {span.name: span for span in phases(start)}
    assert list(spans) == ["load", "skeleton", "fill", "first token"]
    assert spans["load"].nbytes == sum(layer.nbytes for layer in start.layers)
    assert spans["load"].end <= spans["first token"].start and spans["first token"].end - start.begin == pytest.approx(start.seconds)


# --- what the pictures and the sentences say -----------------------------------------------------------------------------


def samples(*rounds: tuple[float, float, float, float]) -> dict[Mode, dict[int, Sample]]:
    return {mode: {number: Sample(row[at], row[at] / 2, 1) for number, row in enumerate(rounds)} for at, mode in enumerate(MODES)}


def bench(device: str = "cpu") -> dict[str, Any]:
    series = [
        Series(30, "asked for", LAYER_SECONDS, samples((20.0, 10.0, 10.0, 10.0), (30.0, 20.0, 15.0, 15.0))),
        Series(4, "asked for", LAYER_SECONDS, samples((11.0, 12.0, 10.0, 1.0), (12.0, 11.0, 10.0, 1.0))),
        Series(90, "asked for", LAYER_SECONDS, samples((9.0, 10.0, 4.0, 5.0), (9.0, 12.0, 4.0, 5.0))),
    ]
    return assemble(series, LAYERS, device=device, cores=2, facts={})


def test_a_gain_is_claimed_only_where_all_rounds_agree() -> None:
    text = curve.gain_text(bench())
    assert "faster in every round: prompts of 30 tokens" in text and "slower in every round: prompts of 90 tokens" in text
    assert "rounds disagree): prompts of 4 tokens" in text and "the largest gain: x1.75 (1.50 to 2.00) with 30 tokens" in text
    assert "by the median: prompts of 4, 30 tokens" in text


def test_the_curve_is_said_as_it_is_drawn() -> None:
    document = bench()
    axes = curve.plot_first_token(document)
    assert [container.get_label() for container in axes.containers] == ["load, then run", "run while loading"]
    assert [row[4] for row in curve.first_token_table(document).rows] == ["11.5 s", "15.0 s", "11.0 s"]
    assert np.asarray(axes.lines[3].get_ydata()).tolist() == [11.5, 15.0, 11.0]
    assert list(axes.get_xticks()) == [4, 30, 90] and axes.get_xlabel() and axes.get_ylabel()
    alt = curve.first_token_alt_text(document)
    assert "30 tokens: load, then run 25.0 s, run while loading 15.0 s" in alt and "gain x1.75 (1.50 to 2.00)" in alt
    table = {cells[0]: cells for cells in curve.first_token_table(document).rows}
    assert list(table) == ["4", "30", "90"] and table["30"][5] == "x1.75 (1.50 to 2.00)" and table["30"][7]
    assert all(cells[7] == "" for cells in curve.first_token_table(bench("cuda:0")).rows), "no shared cores on a GPU"


def test_predictions_stand_beside_what_was_measured() -> None:
    cells = {row[0]: row for row in curve.prediction_table(parts(), bench()).rows}["30"]
    assert cells == ("30", "16.0 s", "25.0 s", "1.56", "13.0 s", "15.0 s", "1.15")
    predictions = [parts().predict(tokens) for tokens in range(4, 40)]
    axes = curve.plot_predictions(predictions)
    assert len(axes.lines) == 4 and list(axes.get_xticks()) == [4, 8, 16, 32]
    text = curve.predictions_text(parts(), predictions)
    assert "the embedding is 40.0 % of its bytes" in text and "30 tokens" in text and "the pipeline is the bound, which begins with the embedding's bytes" in text
    assert text in curve.predictions_alt_text(parts(), predictions)


def test_the_take_away_says_how_sure_it_is() -> None:
    bytes_there = Span("read", 1.0, 2.0, "disk", 100)
    spans = (bytes_there, Span("fill", 2.0, 2.5), Span("embedding", 2.5, 3.0, "wait"), Span("head", 3.0, 4.0, "compute"), Span("first token", 2.5, 5.0, "request"))
    text = curve.take_away_text(bench(), [Start("overlapped", LAYERS, spans)])
    assert "30 tokens: 25.0 s became 15.0 s, x1.75 (1.50 to 2.00); it was faster in every round" in text
    assert "bytes are there after 1.00 s, the module is built after 1.50 s (the later is the module), the first layer runs at 2.00 s" in text
    assert "layers wait 500 ms for bytes and compute 1.00 s; first token 4.00 s" in text
    only = bench()
    only["prompts"] = [prompt for prompt in only["prompts"] if prompt["tokens"] == 4]
    assert "though not in every round" in curve.take_away_text(only, [])


def test_a_recorded_run_is_drawn_and_without_one_the_page_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "No run on a CUDA GPU has been recorded yet" in str(curve.recorded_overlap("no_such_run.json"))
    saved = save_document(bench() | {"machine": {}, "model": {}, "method": {}}, tmp_path / "bench.json")
    monkeypatch.setattr(curve, "recorded_runs", lambda name: {"a GPU": saved})
    found = curve.recorded_overlap("bench.json")
    assert isinstance(found, Described) and "faster in every round: prompts of 30 tokens" in found.caption


# --- the page ------------------------------------------------------------------------------------------------------------


def cell_with(words: str) -> Any:
    return next(cell for cell in nbformat.read(CHAPTER, as_version=4).cells if cell.cell_type == "code" and words in cell.source)


def test_what_other_systems_do_is_called_and_not_written_again() -> None:
    """Chapter 10 tests `zigzag` and `hydraserve_ttft`; here the page shows them at work, with the figures that its prose names."""
    said = "".join(output.text for output in cell_with("two full ones").outputs)
    assert "(7, 12, 17, 22, 27, 32, 36)" in said and "(7, 11, 15, 18, 20, 22, 23)" in said and "24.5" in said
    assert "import hydraserve_ttft" in cell_with("workers in (1, 2, 4)").source
    assert "import best_effort, zigzag" in cell_with("getsource(best_effort)").source


def test_its_cells_are_numbered_in_order() -> None:
    cells = nbformat.read(CHAPTER, as_version=4).cells
    assert [cell.id for cell in cells] == [f"c04-{number:02d}" for number in range(len(cells))]
