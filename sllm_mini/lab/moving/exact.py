"""What stays the same to the bit when a request moves, and what does not: logits under teacher forcing. Chapter 07.

A source decodes a text greedily, step by step. A destination that was given the KV cache, and one that computed it again from
the tokens, then take the same single step at every position of that text, with the very tokens the source took ("teacher
forcing": one that differs does not lead the rest astray). Compared are the logits. Costs three decode steps a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from sllm_mini.checkpoint import Checkpoint
from sllm_mini.inference.engine import Engine
from sllm_mini.inference.text import load_tokenizer
from sllm_mini.lab.moving.parts import torch_threads
from sllm_mini.lab.style import MUTED, color_of, darker, use_style
from sllm_mini.lab.table import Table
from sllm_mini.loading import load_model

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure

Way = Literal["copied", "recomputed"]
WAYS: tuple[Way, ...] = ("copied", "recomputed")
_CHUNK = 128


@dataclass(frozen=True, slots=True)
class Place:
    """One position: `margin` by which the source's best token leads the second, `lead` by which the same token leads all others at
    the destination (below 0: it would choose another), `changed` how many logits have other bits."""

    position: int
    margin: float
    lead: float
    changed: int
    differs: bool


@dataclass(frozen=True, slots=True)
class Compared:
    """All positions of all texts for one dtype and one way. `kv_equal`: whether the caches were equal to the bit."""

    dtype: str
    way: Way
    places: tuple[Place, ...]
    kv_equal: bool

    @property
    def differing(self) -> tuple[Place, ...]:
        """Where the destination would choose another token, by the source's margin there."""
        return tuple(sorted((place for place in self.places if place.differs), key=lambda place: place.margin))


def compare_ways(checkpoint: Checkpoint, prompts: Sequence[str], *, dtype: str, new_tokens: int = 96, device: str = "cpu") -> list[Compared]:
    """Both ways for `prompts`, in a dtype of torch ("float32", "bfloat16"). Raises what loading and running the model raise."""
    import torch

    model = load_model(checkpoint, device).to(getattr(torch, dtype))
    engine = Engine(model, load_tokenizer(checkpoint), name=dtype)
    found: dict[Way, list[Place]] = {way: [] for way in WAYS}
    equal = dict.fromkeys(WAYS, True)
    with torch_threads(1), torch.inference_mode():  # the model is tiny, and the order of sums must not depend on who else runs
        for prompt in prompts:
            ids = engine.encode(prompt)
            sequence = [*ids, *engine.complete(ids, max_new_tokens=new_tokens).token_ids]
            logits, cache = _source(engine, sequence, len(ids))
            for way in WAYS:
                theirs, copy = _destination(engine, sequence, len(ids), cache if way == "copied" else None)
                equal[way] &= torch.equal(cache, copy)
                found[way] += [_place(position, one, other) for position, (one, other) in enumerate(zip(logits, theirs, strict=True), len(ids) + 1)]
    return [Compared(dtype, way, tuple(found[way]), equal[way]) for way in WAYS]


def _step(engine: Engine, row: int, token_ids: Sequence[int]) -> torch.Tensor:
    import torch

    return engine.runner.extend(engine.kv, row, torch.tensor([list(token_ids)], device=engine.runner.device))[0]


def _source(engine: Engine, sequence: Sequence[int], prompt_length: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Logits after each new token but the last, and the KV cache at the end: the prompt in one pass, then step by step."""
    row = engine.kv.add_row()
    try:
        _step(engine, row, sequence[:prompt_length])
        logits = [_step(engine, row, [token_id]).clone() for token_id in sequence[prompt_length:-1]]
        return logits, engine.kv.read(row, 0, len(sequence) - 1)
    finally:
        engine.kv.pop_row(clean=True)


def _destination(engine: Engine, sequence: Sequence[int], prompt_length: int, cache: torch.Tensor | None) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The same steps on a cache that was given, or computed again in chunks, as a guest's is."""
    row = engine.kv.add_row()
    try:
        if cache is not None:
            engine.kv.write(row, cache)
        else:
            for start in range(0, len(sequence) - 1, _CHUNK):
                _step(engine, row, sequence[start : min(start + _CHUNK, len(sequence) - 1)])
        held = engine.kv.read(row, 0, len(sequence) - 1)
        logits = []
        for position in reversed(range(prompt_length, len(sequence) - 1)):  # backwards: a step writes its own token's KV, which earlier ones do not see
            engine.kv.lengths[row] = position
            logits.append(_step(engine, row, [sequence[position]]).clone())
        return logits[::-1], held
    finally:
        engine.kv.pop_row(clean=True)


def _place(position: int, source: torch.Tensor, destination: torch.Tensor) -> Place:
    one, other = source.float(), destination.float()
    best, second = one.topk(2).values.tolist()
    token = int(one.argmax())
    rest = other.clone()
    rest[token] = -float("inf")
    return Place(position, best - second, float(other[token]) - float(rest.max()), int((source != destination).sum()), int(other.argmax()) != token)


def plot_margins(compared: Sequence[Compared]) -> Figure:
    """For each recomputed run a panel: how far the lead of the best token moved against the margin it had. A token can differ
    only on the diagonal or above; those that do are crossed. What is 0 stands at the left or the lower edge."""
    from matplotlib import pyplot

    use_style()
    runs = [run for run in compared if run.way == "recomputed"]
    figure, panels = pyplot.subplots(1, len(runs), figsize=(7.4, 3.8), sharex=True, sharey=True, squeeze=False, layout="constrained")
    values = [value for run in runs for place in run.places for value in (place.margin, abs(place.margin - place.lead)) if value > 0]
    floor, top = min(values) / 2, max(values) * 2
    for run, ax in zip(runs, panels[0], strict=True):
        for differs, role, marker, words in ((False, "disk", "o", "same token"), (True, "dram", "X", "another token")):
            places = [place for place in run.places if place.differs == differs]
            xs, ys = ([max(value, floor) for value in line] for line in _lines(places))
            ax.plot(xs, ys, marker, color=color_of(role), markeredgecolor=darker(color_of(role)), markersize=8 if differs else 3.5, linestyle="", label=words)
        ax.plot([floor, top], [floor, top], color=MUTED, linewidth=1.0, linestyle="--", label="moved as far as it led")
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_title(f"{run.dtype}: {len(run.differing)} of {len(run.places)} differ", fontsize=10)
        ax.set_xlabel("lead of the best token (logits)")
    panels[0, 0].set_ylabel("how far recomputing moved it (logits)")
    panels[0, 0].legend(loc="upper left", fontsize=8.5)
    return figure


def _lines(places: Sequence[Place]) -> tuple[list[float], list[float]]:
    return [place.margin for place in places], [abs(place.margin - place.lead) for place in places]


def compared_table(compared: Sequence[Compared]) -> Table:
    """A row for each dtype and way: what was equal to the bit, how many tokens differ, and the largest margin among those."""
    rows: list[tuple[Any, ...]] = []
    for run in compared:
        same = sum(place.changed == 0 for place in run.places)
        most = f"{run.differing[-1].margin:.3g}" if run.differing else ""
        below = sum(place.margin <= run.differing[-1].margin for place in run.places) if run.differing else 0
        rows.append(
            (run.dtype, run.way, "yes" if run.kv_equal else "no", f"{same} of {len(run.places)}", f"{len(run.differing)}", most, f"{below}" if run.differing else "")
        )
    headers = ("dtype", "KV cache", "same bytes", "same logits", "tokens differ", "their largest margin", "steps as close")
    return Table(headers, tuple(rows), caption="The same step at every position", numeric=frozenset({3, 4, 5, 6}))


def compared_text(compared: Sequence[Compared]) -> str:
    """Which tokens differ, each with its margin."""
    parts = []
    for run in compared:
        places = run.differing
        listed = ", ".join(f"{place.margin:.3g}" for place in places[:12]) + (f" and {len(places) - 12} more" if len(places) > 12 else "")
        said = f"{len(places)} of {len(run.places)} tokens differ" + (f", where the best led by {listed}" if places else "")
        parts.append(f"{run.dtype}, {run.way}: {said}")
    return "; ".join(parts) + "."
