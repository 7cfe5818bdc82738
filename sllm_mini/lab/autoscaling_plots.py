"""What autoscalers wanted, got and made requests wait, drawn and said. Computed in virtual time (`autoscaling`). Shown in chapter 10."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sllm_mini.lab.autoscaling import Course, Moment
from sllm_mini.lab.style import INK, color_of, use_style
from sllm_mini.lab.table import Table
from sllm_mini.lab.units import seconds_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LINES = (("remote", "-"), ("disk", "--"), ("runtime", "-."), ("process", "-"), ("dram", "--"))


def needed(phases: Sequence[tuple[float, float]], service_seconds: float, concurrency: int) -> tuple[list[float], list[float]]:
    """For phases of (seconds, requests a second): when each begins and, at last, ends; and how many instances' whole time it takes
    (Little's law: rate x seconds are there at once; by `concurrency` an instance)."""
    times, counts = [0.0], []
    for seconds, rate in phases:
        times.append(times[-1] + seconds)
        counts.append(rate * service_seconds / concurrency)
    return times, counts


def plot_courses(courses: Sequence[Course], phases: Sequence[tuple[float, float]], *, service_seconds: float, concurrency: int) -> Figure:
    """A row for each course, on one clock and one scale: instances desired (line), ready (area), and what the load needs (grey).

    Raises ValueError without courses. Not safe while another thread draws."""
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    if not courses:
        raise ValueError("there is nothing to draw; give at least one course")
    use_style()
    figure, rows = pyplot.subplots(len(courses), 1, sharex=True, sharey=True, figsize=(7.4, 0.7 + 1.25 * len(courses)), layout="constrained", squeeze=False)
    times, counts = needed(phases, service_seconds, concurrency)
    for ax, course in zip(rows[:, 0], courses, strict=True):
        at = [moment.time for moment in course.moments]
        ax.fill_between(at, [moment.ready for moment in course.moments], step="post", color=color_of("ready"), label="ready")
        ax.stairs(counts, times, color=INK, linewidth=1.8, linestyle=":", label="what the load needs")
        ax.step(at, [moment.desired for moment in course.moments], where="post", color=color_of("process"), linewidth=1.4, label="desired")
        ax.set_title(f"{course.name}: at most {max(moment.desired for moment in course.moments)} desired", fontsize=10)
    rows[0, 0].yaxis.set_major_locator(MaxNLocator(4, integer=True))
    rows[-1, 0].set_xlabel("seconds (virtual)")
    rows[len(courses) // 2, 0].set_ylabel("instances")
    handles, labels = rows[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure


def courses_text(courses: Sequence[Course]) -> str:
    """The finding: how many each wanted at most, and how long requests waited."""
    said = [
        f"{course.name}: at most {max(moment.desired for moment in course.moments)} desired, 99 of 100 requests waited {seconds_text(course.wait(0.99))} or less"
        + (f", {course.refused} were refused" if course.refused else "")
        for course in courses
    ]
    return "; ".join(said) + "."


def courses_table(courses: Sequence[Course], *, what: str = "autoscaler") -> Table:
    """One row for each course; `what` heads the column of their names."""
    rows = [
        (
            course.name, str(course.starts), str(course.most_ready), f"{course.instance_seconds:,.0f}", seconds_text(course.mean_wait),
            seconds_text(course.wait(0.99)), str(max(moment.queued for moment in course.moments)), str(course.refused),
        )
        for course in courses
    ]  # fmt: skip
    return Table(
        headers=(what, "starts", "most ready", "instance-seconds", "mean wait", "wait of 99 %", "longest queue", "refused"),
        rows=tuple(rows),
        note="Computed. An instance counts from the beginning of its start; waits are of the requests that ran.",
        numeric=frozenset(range(1, 8)),
    )


def _between(course: Course, begin: float, end: float) -> list[Moment]:
    """The moments that hold somewhere between `begin` and `end`, the one that lasts into it included."""
    before = [moment for moment in course.moments if moment.time <= begin]
    return before[-1:] + [moment for moment in course.moments if begin < moment.time <= end]


def starts_text(courses: Sequence[Course], begin: float, end: float) -> str:
    """What `plot_starts` shows, and no more: the most that were ready and the most that were queued, from `begin` to `end`."""
    said = []
    for course in courses:
        shown = _between(course, begin, end)
        said.append(f"{course.name}: at most {max(moment.ready for moment in shown)} ready and {max(moment.queued for moment in shown)} queued")
    return f"From second {begin:g} to {end:g}, {'; '.join(said)}."


def plot_starts(courses: Sequence[Course], begin: float, end: float) -> Figure:
    """Two panels on one clock: instances ready and requests queued, a line for each course. Raises ValueError without
    courses. Not safe while another thread draws."""
    from matplotlib import pyplot

    if not courses:
        raise ValueError("there is nothing to draw; give at least one course")
    use_style()
    figure, (upper, lower) = pyplot.subplots(2, 1, sharex=True, figsize=(7.4, 4.4), layout="constrained")
    for number, course in enumerate(courses):
        role, line = _LINES[number % len(_LINES)]
        at = [moment.time for moment in course.moments]
        for ax, values in ((upper, [m.ready for m in course.moments]), (lower, [m.queued for m in course.moments])):
            ax.step(at, values, where="post", color=color_of(role), linestyle=line, label=course.name)
    shown = [moment for course in courses for moment in _between(course, begin, end)]
    highest = (max((moment.ready for moment in shown), default=1), max((moment.queued for moment in shown), default=1))
    for ax, label, top in zip((upper, lower), ("instances ready", "requests queued"), highest, strict=True):
        ax.set_ylabel(label)
        ax.set_ylim(0, max(top, 1) * 1.08)
        ax.tick_params(labelcolor=INK)
    lower.set_xlim(begin, end)
    lower.set_xlabel("seconds (virtual)")
    handles, labels = upper.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(courses))
    return figure
