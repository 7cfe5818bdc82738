"""The first request to a loaded model, straight away or after a dummy request: warm-up as work that is done earlier.

A dummy request is the usual warm-up of an engine (DeepServe, ATC'25, sends one). It adds work, that of a whole request, so
that what only a first one does is done where nobody waits. Each sample is a fresh process, both kinds take turns; the model is the tiny trained one unless another is
given. Shown in chapter 06.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from sllm_mini.errors import ModelError
from sllm_mini.lab.ladder.plots import Factor
from sllm_mini.lab.style import color_of, darker, use_style
from sllm_mini.lab.units import seconds_text
from sllm_mini.lab.warmup.measure import Run, run_child
from sllm_mini.lab.warmup.picture import factor_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STRAIGHT, AFTER_DUMMY = "straight away", "after a dummy request"


@dataclass(frozen=True, slots=True)
class FirstRequest:
    """One process's first request. Seconds of the dummy request (0 without), to the first token of the request, and to that
    of the same request again."""

    kind: str
    dummy_seconds: float
    first_seconds: float
    again_seconds: float


def measure_first_requests(path: Path, *, rounds: int = 3, seed: int = 0, run: Run = run_child) -> list[FirstRequest]:
    """Both kinds in each round, in an order that `seed` fixes. Raises ValueError without a round, ModelError if a child fails or
    the answers differ."""
    if rounds < 1:
        raise ValueError(f"{rounds} rounds measure nothing; ask for at least 1")
    generator, found, texts = random.Random(seed), list[FirstRequest](), set[tuple[int, ...]]()
    for _ in range(rounds):
        for kind in generator.sample((STRAIGHT, AFTER_DUMMY), 2):
            answer = run("first_request", {"path": str(path), "dummy": kind == AFTER_DUMMY}, {})
            texts.add(tuple(answer["token_ids"]))
            found.append(FirstRequest(kind, answer["dummy_seconds"], answer["first_seconds"], answer["again_seconds"]))
    if len(texts) > 1:
        raise ModelError("the request gave other tokens after a dummy request; a warm-up that changes answers is none")
    return found


def request_factor(found: Sequence[FirstRequest]) -> Factor:
    """How many times sooner the first token came after a dummy request, round by round."""
    straight, after = ([one.first_seconds for one in found if one.kind == kind] for kind in (STRAIGHT, AFTER_DUMMY))
    ratios = [slow / fast for slow, fast in zip(straight, after, strict=True)]
    return Factor(median(ratios), min(ratios), max(ratios))


def request_medians(found: Sequence[FirstRequest]) -> dict[str, tuple[float, float]]:
    """By kind: the medians of the dummy request and of the first token. "the same again" is what is left when all is warm."""
    medians = {}
    for kind in (STRAIGHT, AFTER_DUMMY):
        own = [one for one in found if one.kind == kind]
        medians[kind] = (median(one.dummy_seconds for one in own), median(one.first_seconds for one in own))
    return medians | {"the same again": (0.0, median(one.again_seconds for one in found))}


def plot_requests(found: Sequence[FirstRequest], ax: Axes | None = None) -> Axes:
    """Bars that begin when the weights are there: the dummy request, then the wait for the first token. Raises ValueError
    without a sample. Not safe while another thread draws."""
    from matplotlib import pyplot

    if not found:
        raise ValueError("no request was measured; measure at least one round")
    if ax is None:
        use_style()
        _, ax = pyplot.subplots(figsize=(7.2, 2.5), layout="constrained")
    longest = 0.0
    for row, (kind, (dummy, first)) in enumerate(request_medians(found).items()):
        own = [one.first_seconds for one in found if one.kind == kind] or [one.again_seconds for one in found]
        spread = [[1e3 * (first - min(own))], [1e3 * (max(own) - first)]]
        labels = ("before anyone waits: the dummy request", "the request's wait for its first token") if row == 1 else (None, None)
        if dummy:
            ax.barh(row, 1e3 * dummy, height=0.6, color=color_of("wait"), edgecolor=darker(color_of("wait")), linewidth=0.5, label=labels[0])
        color = color_of("ready")
        ax.barh(row, 1e3 * first, left=1e3 * dummy, height=0.6, xerr=spread, color=color, edgecolor=darker(color), linewidth=0.5, error_kw={"elinewidth": 1, "capsize": 2}, label=labels[1])
        ax.annotate(f" {seconds_text(first)}", (1e3 * (dummy + max(own)), row), va="center", fontsize=9)
        longest = max(longest, 1e3 * (dummy + max(own)))
    ax.set_yticks(range(3), list(request_medians(found)))
    ax.set_ylim(2.6, -0.6)
    ax.set_xlim(0, 1.18 * longest)
    ax.grid(axis="y", visible=False)
    ax.tick_params(axis="y", length=0)
    ax.set_xlabel("milliseconds since the weights are there")
    ax.legend(loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=2, frameon=False)
    return ax


def requests_text(found: Sequence[FirstRequest]) -> str:
    """What the bars show, in words."""
    medians: Mapping[str, tuple[float, float]] = request_medians(found)
    factor, dummy, rounds = request_factor(found), medians[AFTER_DUMMY][0], len(found) // 2
    said = (
        f"First token {seconds_text(medians[STRAIGHT][1])} after a request that comes straight away, {seconds_text(medians[AFTER_DUMMY][1])} after a dummy request, "
        f"{factor_text(factor, rounds)}. The same request again: {seconds_text(medians['the same again'][1])}."
    )
    if factor.least <= 1 and rounds > 1:
        return f"{said} The dummy request took {seconds_text(dummy)}; whether it spared the next one anything, these rounds do not tell."
    straight, after = ([one.first_seconds for one in found if one.kind == kind] for kind in (STRAIGHT, AFTER_DUMMY))
    spared = median(slow - fast for slow, fast in zip(straight, after, strict=True))
    return f"{said} The dummy request took {seconds_text(dummy)}, before anyone waited, and spared the next one {seconds_text(spared)} (medians of the rounds)."
