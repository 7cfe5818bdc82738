"""What a part of the bench says to a reader: its figure, or why there is none; and its finding in sentences.

Arithmetic on the document of `measure`; measures nothing. Shown in chapter 06.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from sllm_mini.lab.figure import Described, describe
from sllm_mini.lab.recorded import recorded_note, recorded_runs
from sllm_mini.lab.table import Table
from sllm_mini.lab.units import nbytes_text, seconds_text
from sllm_mini.lab.warmup.measure import AGAIN, FIRST, read_warmup, rows_of
from sllm_mini.lab.warmup.picture import bracketed, described_warmup, factor_of, plot_part, warmup_alt_text


@dataclass(frozen=True, slots=True)
class Extra:
    """Seconds by which a first call was longer than the next: the median over the rounds, the least, the most."""

    median: float
    least: float
    most: float

    def __str__(self) -> str:
        return f"{seconds_text(self.median)} ({self.range})"

    @property
    def range(self) -> str:
        return f"{seconds_text(self.least)} to {seconds_text(self.most)}"


def shown_part(document: Mapping[str, Any], part: str, caption: str = "") -> Described | str:
    """The part's bars with alt text; where it was not measured, the reason, for the page."""
    if not rows_of(document, part):
        return skipped_note(document)
    return describe(plot_part(document, part), warmup_alt_text(document, [part]), caption=caption)


def skipped_note(document: Mapping[str, Any]) -> str:
    """What was not measured and why, a line each; empty where everything was."""
    return "\n".join(f"Skipped on this machine, {row['name']}: {row['reason']}." for row in document["skipped"])


def recorded_warmup(name: str) -> Described | str:
    """All parts as recorded on the first GPU that has a run of that name; the note where there is none. Raises FormatError for
    a recorded run that is no document of this bench."""
    runs = recorded_runs(name)
    if not runs:
        return recorded_note(name)
    drawn = described_warmup(read_warmup(next(iter(runs.values()))))
    drawn.caption = recorded_note(name)
    return drawn


def extra_seconds(document: Mapping[str, Any], name: str) -> Extra:
    """By how much a first call was longer than the next, round by round; may be negative. Raises ValueError if it was not
    measured."""
    states = {row["state"]: row["samples"] for row in rows_of(document, "first calls") if row["name"] == name}
    if set(states) != {FIRST, AGAIN}:
        raise ValueError(f"the first call of {name} was not measured; see what was skipped")
    found = [first - again for first, again in zip(states[FIRST], states[AGAIN], strict=True)]
    return Extra(median(found), min(found), max(found))


def first_calls_text(document: Mapping[str, Any]) -> str:
    """Which first calls were longer than the next in every round, which cannot be told, and whether the product explains the
    prefill."""
    extras = {name: extra_seconds(document, name) for name in _first_calls(document)}
    sure = [name for name, extra in extras.items() if extra.least > 0]
    rest = [name for name in extras if name not in sure]
    said = [f"The first call was longer in every round for {'; '.join(sure)}." if sure else "No first call was longer in every round."]
    if rest:
        said.append(f"For {'; '.join(rest)} the rounds disagree or show no difference: what a first call adds there is not resolved.")
    if sure:
        largest = max(sure, key=lambda name: extras[name].median)
        said.append(f"The most is added to {largest}: {seconds_text(extras[largest].median)}.")
    return " ".join(said)


def prefill_account_text(document: Mapping[str, Any]) -> str:
    """Whether the first product of the model's own type explains what a first prefill adds, as far as the rounds can tell.
    Raises ValueError if either was not measured."""
    dtype = document["model"]["dtype"]
    product, prefill = extra_seconds(document, f"matrix product, {dtype}"), extra_seconds(document, "prefill")
    found = f"A first product in {dtype}, the model's type, adds {product}, a first prefill {prefill}"
    if min(product.least, prefill.least) <= 0 or (product.most >= prefill.least and prefill.most >= product.least):
        return f"{found}. The ranges of the rounds overlap or reach below zero: this run does not tell whether the product is the whole of it."
    if product.most < prefill.least:
        return f"{found}: more in every round. So most of it is something else than the product, {1 - product.median / prefill.median:.0%} by the medians."
    return f"{found}: less in every round. So a product of that shape is no measure of the model's own."


def first_calls_table(document: Mapping[str, Any]) -> Table:
    """First and again as medians, what the first adds, and how many times longer it is, round by round; where the rounds
    disagree, the ranges alone."""
    rows = []
    for name in _first_calls(document):
        own = [row for row in rows_of(document, "first calls") if row["name"] == name]
        middle = {row["state"]: seconds_text(row["seconds_median"]) for row in own}
        extra, factor = extra_seconds(document, name), factor_of(document, "first calls", name)
        found = (str(extra), bracketed(factor, len(own[0]["samples"])))
        if extra.least <= 0 <= extra.most:
            found = (f"no finding ({extra.range})", f"no finding ({factor.least:.2f} to {factor.most:.2f})")
        rows.append((name, middle[FIRST], middle[AGAIN], *found))
    headers = ("call", "first", "again", "the first adds (rounds)", "times as long (rounds)")
    return Table(headers, tuple(rows), numeric=frozenset({1, 2, 3, 4}), note="Each sample is a fresh process; what is added and the factor are of one round each, and of these the median, least and most.")


def _first_calls(document: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(row["name"] for row in rows_of(document, "first calls")))


def kernels_text(document: Mapping[str, Any], predicted_seconds: float | None = None) -> str:
    """The three states against each other, and what the cached one spends its time on. `predicted_seconds`: of reading the file."""
    rows = {row["state"]: row for row in rows_of(document, "kernels")}
    middle = {state: row["seconds_median"] for state, row in rows.items()}
    steps = rows["cached"]["facts"]["seconds"]
    longest = max(steps, key=lambda step: steps[step])
    names = {"compiler": "asking the compiler which version it is", "cache": "reading the file", "load": "loading it onto the GPU"}
    said = (
        f"Just in time {seconds_text(middle['just in time'])}, cached {seconds_text(middle['cached'])}, ahead of time {seconds_text(middle['ahead of time'])} (medians). "
        f"Of the cached state's last round, {seconds_text(steps[longest])} went into {names.get(longest, longest)}."
    )
    if predicted_seconds is not None:
        said += f" Predicted for reading the file: {seconds_text(predicted_seconds)}."
    return said


def profile_text(document: Mapping[str, Any]) -> str:
    """What the trial found, and what it and its record cost."""
    rows = {row["state"]: row for row in rows_of(document, "memory profile")}
    facts, name = rows["measured"]["facts"], rows["measured"]["name"]
    return (
        f"The trial took {seconds_text(rows['measured']['seconds_median'])} and its record {seconds_text(rows['recorded']['seconds_median'])} to read, "
        f"{bracketed(factor_of(document, 'memory profile', name), len(rows['measured']['samples']))}. It found {nbytes_text(facts['step_nbytes'])} for a worst-case step and {nbytes_text(facts['kv_nbytes_per_token'])} of keys and values per token."
    )
