"""The first token against the length of the prompt: what was predicted, what was measured, what can be.

Reads the document of `bench overlap` and the predictions of `parts`; draws and words, never measures. Ratios are those
that the document took round by round. Shown in chapter 04.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sllm_mini.inference.overlap import COMPUTE_LANE, WAIT_LANE
from sllm_mini.lab.bench.document import read_document
from sllm_mini.lab.figure import Described, describe
from sllm_mini.lab.overlap.document import KIND, TARGET_FACTOR, prompt_rows
from sllm_mini.lab.overlap.parts import Parts, Prediction
from sllm_mini.lab.overlap.picture import arrival_seconds
from sllm_mini.lab.overlap.start import Start
from sllm_mini.lab.recorded import recorded_note, recorded_runs
from sllm_mini.lab.style import INK, MUTED, color_of, use_style
from sllm_mini.lab.table import Table
from sllm_mini.lab.units import seconds_text, share_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BARS = (("serial", "process", "o"), ("overlapped", "dram", "s"))
_WORDS = {"serial": "load, then run", "overlapped": "run while loading"}


def plot_predictions(predictions: Sequence[Prediction], ax: Axes | None = None) -> Axes:
    """Predicted seconds to the first token against the length of the prompt, and the parts that they are made of."""
    from matplotlib import pyplot

    if ax is None:
        use_style()
        _, ax = pyplot.subplots(figsize=(7.2, 3.4), layout="constrained")
    tokens = [one.tokens for one in predictions]
    ax.plot(tokens, [one.serial for one in predictions], color=color_of("process"), label="load, then run: load + prefill")
    ax.plot(tokens, [one.overlapped for one in predictions], color=color_of("dram"), label="run while loading: the larger bound")
    ax.plot(tokens, [one.load for one in predictions], color=MUTED, linestyle="--", linewidth=1.1, label="load alone")
    ax.plot(tokens, [one.prefill for one in predictions], color=MUTED, linestyle=":", linewidth=1.3, label="prefill alone")
    return _finish(ax, tokens, max(one.serial for one in predictions))


def plot_first_token(document: Mapping[str, Any], ax: Axes | None = None) -> Axes:
    """Measured seconds to the first token against the length of the prompt, both ways, with load and prefill alone and
    the bound that follows from these two; bars from the fastest round to the slowest."""
    from matplotlib import pyplot

    if ax is None:
        use_style()
        _, ax = pyplot.subplots(figsize=(7.2, 3.8), layout="constrained")
    prompts = _ascending(document)
    tokens = [prompt["tokens"] for prompt in prompts]
    rows = [prompt_rows(document, count) for count in tokens]
    for mode, role, marker in _BARS:
        found = [row[mode] for row in rows]  # type: ignore[index]
        middle = [row["seconds_median"] for row in found]
        spread = [[row["seconds_median"] - row["seconds_min"] for row in found], [row["seconds_max"] - row["seconds_median"] for row in found]]
        ax.errorbar(tokens, middle, yerr=spread, color=color_of(role), marker=marker, markersize=6, capsize=3, elinewidth=1.0, label=_WORDS[mode])
    ax.plot(tokens, [row["load"]["seconds_median"] for row in rows], color=MUTED, linestyle="--", linewidth=1.1, label="load alone")
    ax.plot(tokens, [row["prefill"]["seconds_median"] for row in rows], color=MUTED, linestyle=":", linewidth=1.3, label="prefill alone")
    ax.plot(tokens, [_bound(prompt) for prompt in prompts], color=INK, linestyle="-.", linewidth=1.1, label="bound: pipeline or work")
    return _finish(ax, tokens, max(row[mode]["seconds_max"] for row in rows for mode in row))


def _finish(ax: Axes, tokens: Sequence[int], highest: float) -> Axes:
    ax.set_xscale("log", base=2)
    ax.set_xticks(_ticks(tokens))
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.minorticks_off()
    ax.set_xlabel("tokens of the prompt")
    ax.set_ylabel("seconds to the first token")
    ax.set_ylim(0, 1.08 * highest)
    ax.legend(loc="upper left")
    return ax


def _ticks(tokens: Sequence[int]) -> list[int]:
    """The lengths themselves where they are few, else powers of two between them."""
    return sorted(tokens) if len(tokens) <= 6 else [1 << power for power in range(14) if min(tokens) <= 1 << power <= max(tokens)]


def _bound(prompt: Mapping[str, Any]) -> float:
    return max(prompt["pipeline_seconds_median"], prompt.get("work_seconds_median", 0.0))


def _ascending(document: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return sorted(document["prompts"], key=lambda prompt: int(prompt["tokens"]))


def predictions_text(parts: Parts, predictions: Sequence[Prediction]) -> str:
    """Where overlap can gain most, and what stands in its way."""
    best = max(predictions, key=lambda one: one.serial / one.overlapped)
    begins = "the module" if parts.model_seconds > parts.load.seconds * parts.embedding_share() else "the embedding's bytes"
    bound = f"the pipeline is the bound, which begins with {begins}" if best.pipeline > best.work else "the processor time of both over the processors is the bound"
    return (
        f"The load alone takes {seconds_text(parts.load.seconds)}, and the embedding is {share_text(parts.embedding_share())} of its bytes; the "
        f"module is built after {seconds_text(parts.model_seconds)}. The most is to be "
        f"gained with a prompt of {best.tokens} tokens: {seconds_text(best.serial)} becomes {seconds_text(best.overlapped)} (x{best.serial / best.overlapped:.2f}), "
        f"where {bound}."
    )


def predictions_alt_text(parts: Parts, predictions: Sequence[Prediction]) -> str:
    """What `plot_predictions` shows, in words."""
    shown = [predictions[0], predictions[len(predictions) // 2], predictions[-1]]
    listed = ", ".join(f"{one.tokens} tokens {seconds_text(one.serial)} serial and {seconds_text(one.overlapped)} overlapped" for one in shown)
    return f"Two lines of predicted seconds against the length of the prompt: {listed}. {predictions_text(parts, predictions)}"


def ratio_text(prompt: Mapping[str, Any], name: str) -> str:
    """ "x1.34 (1.20 to 1.50)": median of the rounds, the least, the most."""
    return f"x{prompt[f'{name}_median']:.2f} ({prompt[f'{name}_min']:.2f} to {prompt[f'{name}_max']:.2f})"


def first_token_table(document: Mapping[str, Any]) -> Table:
    """A row for each prompt: parts and both ways (medians), and the ratios of the rounds with their spread."""
    cells = []
    for prompt in _ascending(document):
        rows = prompt_rows(document, prompt["tokens"])
        times = (seconds_text(rows[mode]["seconds_median"]) for mode in ("load", "prefill", "serial", "overlapped"))
        ratios = (ratio_text(prompt, name) for name in ("serial_over_overlapped", "ratio_to_pipeline"))
        work = ratio_text(prompt, "ratio_to_work") if "ratio_to_work_median" in prompt else ""
        cells.append((str(prompt["tokens"]), *times, *ratios, work))
    headers = ("tokens", "load", "prefill", "load, then run", "run while loading", "gain", "to the pipeline", "to the work")
    built = [prompt["built_seconds_median"] for prompt in document["prompts"] if "built_seconds_median" in prompt]
    note = "Ratios are medians of the rounds' own ratios, in brackets the least and the most."
    if built:
        note += f" The pipeline begins with the module, which was built after {seconds_text(min(built))} to {seconds_text(max(built))}, or with the first bytes."
    return Table(headers, tuple(cells), caption="The first token", note=note, numeric=frozenset(range(8)))


def prediction_table(parts: Parts, document: Mapping[str, Any]) -> Table:
    """What was predicted before the run beside what the run measured (medians), and measured over predicted."""
    cells = []
    for prompt in _ascending(document):
        one, rows = parts.predict(prompt["tokens"]), prompt_rows(document, prompt["tokens"])
        row = [str(one.tokens)]
        for predicted, mode in ((one.serial, "serial"), (one.overlapped, "overlapped")):
            measured = rows[mode]["seconds_median"]  # type: ignore[index]
            row += [seconds_text(predicted), seconds_text(measured), f"{measured / predicted:.2f}"]
        cells.append(tuple(row))
    headers = ("tokens", "serial predicted", "measured", "ratio", "overlapped predicted", "measured", "ratio")
    return Table(headers, tuple(cells), caption="Predicted and measured", numeric=frozenset(range(7)))


def gain_text(document: Mapping[str, Any]) -> str:
    """The findings, a line each: where overlap was faster in every round, and what it gained at most."""
    groups: dict[str, list[str]] = {"faster in every round": [], "slower in every round": [], "not told apart from serial (rounds disagree)": []}
    faster, slower, unclear = groups
    prompts = _ascending(document)
    for prompt in prompts:
        low, high = prompt["serial_over_overlapped_min"], prompt["serial_over_overlapped_max"]
        groups[faster if low > 1 else slower if high < 1 else unclear].append(str(prompt["tokens"]))
    lines = [f"overlapped, {words}: prompts of {', '.join(lengths)} tokens" for words, lengths in groups.items() if lengths]
    best = max(prompts, key=lambda prompt: float(prompt["serial_over_overlapped_median"]))
    lines.append(f"the largest gain: {ratio_text(best, 'serial_over_overlapped')} with {best['tokens']} tokens")
    met = [str(prompt["tokens"]) for prompt in prompts if prompt["ratio_to_target_median"] <= 1]
    which = "all of them" if len(met) == len(prompts) else f"prompts of {', '.join(met)} tokens" if met else "none of them"
    lines.append(f"within {TARGET_FACTOR} x max(load, prefill) + one layer, by the median: {which}")
    return "\n".join(lines)


def first_token_alt_text(document: Mapping[str, Any]) -> str:
    """What `plot_first_token` shows, in words."""
    parts = []
    for prompt in _ascending(document):
        rows = prompt_rows(document, prompt["tokens"])
        told = ", ".join(f"{words} {seconds_text(rows[mode]['seconds_median'])}" for mode, words in _WORDS.items())  # type: ignore[index]
        parts.append(f"{prompt['tokens']} tokens: {told}, bound {seconds_text(_bound(prompt))}, gain {ratio_text(prompt, 'serial_over_overlapped')}")
    return f"Seconds to the first token against the length of the prompt. {'; '.join(parts)}."


def recorded_overlap(name: str) -> Described | str:
    """The curve as recorded on the first GPU that has a run of that name; the note where there is none. Raises
    FormatError for a recorded run that is no document of this bench."""
    runs = recorded_runs(name)
    if not runs:
        return recorded_note(name)
    document = read_document(next(iter(runs.values())), KIND)
    return describe(plot_first_token(document), first_token_alt_text(document), caption=f"{recorded_note(name)} {gain_text(document)}")


def take_away_text(document: Mapping[str, Any], starts: Sequence[Start]) -> str:
    """What this run has shown, in sentences made of its figures."""
    prompts = _ascending(document)
    best = max(prompts, key=lambda prompt: float(prompt["serial_over_overlapped_median"]))
    rows = prompt_rows(document, best["tokens"])
    low, high = best["serial_over_overlapped_min"], best["serial_over_overlapped_max"]
    sure = "in every round" if low > 1 else "by the median, though not in every round" if high > 1 else "in no round"
    inner = [start for start in starts if start.mode == "overlapped"]
    lines = [
        f"On this machine overlap gained the most with {best['tokens']} tokens: {seconds_text(rows['serial']['seconds_median'])} became "
        f"{seconds_text(rows['overlapped']['seconds_median'])}, {ratio_text(best, 'serial_over_overlapped')}; it was faster {sure}.",
        f"Of what the load and the prefill of a round allow there, it took {ratio_text(best, 'ratio_to_pipeline')} the pipeline's time"
        + (f" and {ratio_text(best, 'ratio_to_work')} the time of the shared work." if "ratio_to_work_median" in best else "."),
    ]
    lines += [f"In the start that was drawn: {start_text(start)}" for start in inner]
    return "\n".join(lines)


def start_text(start: Start) -> str:
    """What the first layer had to wait for in a recorded start, and how long layers waited for bytes and computed."""
    there, built = arrival_seconds(start)[0][1], start.built_seconds
    began = next(span.end for span in start.spans if span.lane == WAIT_LANE) - start.begin
    later = "the module" if built > there else "its bytes"
    return (
        f"the {start.layers[0].name}'s bytes are there after {seconds_text(there)}, the module is built after {seconds_text(built)} (the later is {later}), the "
        f"first layer runs at {seconds_text(began)}; layers wait {seconds_text(start.lane_seconds(WAIT_LANE))} for bytes and compute "
        f"{seconds_text(start.lane_seconds(COMPUTE_LANE))}; first token {seconds_text(start.seconds)}"
    )
