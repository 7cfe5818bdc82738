"""Moves by length and mode, predicted and measured, and the break-even of copying and recomputing. Draws, never measures. Chapter 07."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sllm_mini.inference.migration import (
    Speeds,
    break_even_bytes_per_second,
    choose_mode,
    copy_seconds,
    recompute_seconds,
)
from sllm_mini.lab.figure import Described, describe
from sllm_mini.lab.moving.document import MODES, break_even, prompt_rows
from sllm_mini.lab.moving.parts import Parts, Prediction, predict
from sllm_mini.lab.moving.trace_plots import MODE_WORDS
from sllm_mini.lab.style import INK, MUTED, color_of, use_style
from sllm_mini.lab.table import Table
from sllm_mini.lab.units import nbytes_text, rate_text, seconds_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LOOKS = {"tokens": ("process", "o"), "kv": ("disk", "s"), "stop_and_copy": ("dram", "^")}
_PANELS = (("nbytes", "bytes sent", 1.0), ("seconds", "ms for the whole move", 1e3), ("pause_steps", "pause in decode steps", 1.0))
_GBIT = 1e9 / 8
_LINKS = (1, 10, 100)
_TOKENS = 1000


def predictions(parts: Parts, contexts: Sequence[int]) -> list[Prediction]:
    """Every mode at every context."""
    return [predict(parts, mode, context) for mode in MODES for context in contexts]


def plot_moves(document: Mapping[str, Any], predicted: Sequence[Prediction]) -> Figure:
    """Bytes, seconds and pause against the context: marks with bars are measured (median, least, most), thin lines predicted."""
    from matplotlib import pyplot

    use_style()
    figure, panels = pyplot.subplots(1, 3, figsize=(9.4, 3.5), layout="constrained")
    for ax, (name, words, scale) in zip(panels, _PANELS, strict=True):
        for mode, (role, marker) in _LOOKS.items():
            rows = prompt_rows(document, mode)
            tokens = [int(row["tokens"]) for row in rows]
            middle = [row[f"{name}_median"] * scale for row in rows]
            spread = [[abs(row[f"{name}_median"] - row[f"{name}_{end}"]) * scale for row in rows] for end in ("min", "max")]
            ax.errorbar(tokens, middle, yerr=spread, color=color_of(role), marker=marker, markersize=6, capsize=3, elinewidth=1.0, label=MODE_WORDS[mode])
            ours = sorted((one for one in predicted if one.mode == mode), key=lambda one: one.context)
            ax.plot([one.context for one in ours], [getattr(one, name) * scale for one in ours], color=color_of(role), linestyle=":", linewidth=1.2)
        ax.set_xscale("log", base=2)
        ax.set_xticks(tokens, [str(count) for count in tokens])
        ax.minorticks_off()
        ax.set_xlabel("tokens of context")
        ax.set_title(words, fontsize=10)
        if name != "pause_steps":
            ax.set_yscale("log")
    panels[2].set_ylim(0, None)
    panels[2].axhline(1, color=MUTED, linewidth=1.0, linestyle="--")
    panels[2].annotate("no pause", (0.99, 1), xycoords=("axes fraction", "data"), xytext=(0, -3), textcoords="offset points", ha="right", va="top", fontsize=8.5, color=MUTED)
    handles, labels = panels[0].get_legend_handles_labels()
    handles += panels[0].plot([], [], color=MUTED, linestyle=":", linewidth=1.2)
    figure.legend(handles, [*labels, "predicted"], loc="outside lower center", ncols=4)
    return figure


def moves_table(document: Mapping[str, Any], predicted: Sequence[Prediction]) -> Table:
    """A row for each mode and context: predicted beside measured, and the speed of recomputing or copying found there."""
    cells = []
    for one in predicted:
        row = next((row for row in prompt_rows(document, one.mode) if row["tokens"] == one.context), None)
        if row is None:
            continue
        speed = ""
        if "recompute_tokens_per_second_median" in row:
            speed = f"{row['recompute_tokens_per_second_median']:,.0f} tokens/s"
        elif "link_bytes_per_second_median" in row:
            speed = rate_text(row["link_bytes_per_second_median"])
        pause = f"{row['pause_steps_median']:.2f} ({row['pause_steps_min']:.2f} to {row['pause_steps_max']:.2f})"
        cells.append((
            MODE_WORDS[one.mode], str(one.context), nbytes_text(one.nbytes), nbytes_text(row["nbytes"]), seconds_text(one.seconds),
            seconds_text(row["seconds_median"]), f"{one.pause_steps:.2f}", pause, speed,
        ))  # fmt: skip
    headers = ("mode", "context", "bytes predicted", "sent", "move predicted", "took", "pause predicted", "pause in steps", "speed found")
    return Table(headers, tuple(cells), caption="Moves, predicted and measured", numeric=frozenset(range(1, 9)), note="Measured: medians; in brackets the least and the most.")


def moves_text(document: Mapping[str, Any]) -> str:
    """The findings at the longest context, from the document alone."""
    rows = {mode: prompt_rows(document, mode)[-1] for mode in MODES}
    said = ", ".join(
        f"{MODE_WORDS[mode]} {nbytes_text(row['nbytes'])} and a pause of {row['pause_steps_median']:.1f} steps ({row['pause_steps_min']:.1f} to {row['pause_steps_max']:.1f})"
        for mode, row in rows.items()
    )
    return (
        f"At {rows['kv']['tokens']} tokens of context: {said}. The KV cache sends x{rows['kv']['nbytes'] / rows['tokens']['nbytes']:,.0f} the bytes of the tokens; "
        f"the whole move takes {seconds_text(rows['tokens']['seconds_median'])} by tokens and {seconds_text(rows['kv']['seconds_median'])} by KV cache."
    )


def plot_break_even(speeds: Speeds, ax: Axes | None = None) -> Axes:
    """Seconds to bring 1 000 tokens near against the link's speed, both ways; the ground tells which one `choose_mode` picks."""
    from dataclasses import replace

    from matplotlib import pyplot

    if ax is None:
        use_style()
        _, ax = pyplot.subplots(figsize=(7.2, 4.1), layout="constrained")
    low, high = _range(speeds)
    links = [low * (high / low) ** (step / 200) for step in range(201)]
    ways = [replace(speeds, link_bytes_per_second=link) for link in links]
    gbits = [link / _GBIT for link in links]
    ax.plot(gbits, [copy_seconds(_TOKENS, way) for way in ways], color=color_of("disk"), label="copy the KV cache")
    ax.plot(gbits, [recompute_seconds(_TOKENS, way) for way in ways], color=color_of("process"), label="send tokens and recompute")
    changes = [link for link, way, after in zip(gbits, ways, ways[1:], strict=False) if choose_mode(_TOKENS, way) != choose_mode(_TOKENS, after)]
    even = break_even_bytes_per_second(speeds) / _GBIT
    for start, stop, role, words in ((gbits[0], even, "process", "recompute"), (even, gbits[-1], "disk", "copy")):
        ax.axvspan(start, stop, color=color_of(role), alpha=0.08, linewidth=0)
        ax.annotate(words, ((start * stop) ** 0.5, 0.04), xycoords=("data", "axes fraction"), ha="center", fontsize=9.5, color=INK)
    ax.plot([even], [recompute_seconds(_TOKENS, speeds)], "D", color=INK, markersize=7, label=f"break-even, {_gbit_text(even)}")
    for gbit in _LINKS:
        ax.axvline(gbit, color=MUTED, linewidth=0.9, linestyle=":")
        ax.annotate(f"{gbit} Gbit/s", (gbit, 1.0), xycoords=("data", "axes fraction"), xytext=(2, -10), textcoords="offset points", fontsize=8.5, color=MUTED)
    here = speeds.link_bytes_per_second / _GBIT
    ax.plot([here], [copy_seconds(_TOKENS, speeds)], "s", color=color_of("disk"), markeredgecolor=INK, markersize=8, label=f"this link, {_gbit_text(here)}")
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlim(gbits[0], gbits[-1])
    ax.set_xlabel("speed of the link (Gbit/s)")
    ax.set_ylabel(f"seconds for {_TOKENS:,} tokens".replace(",", " "))
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.figure.legend(loc="outside lower center", ncols=2, fontsize=9)
    if len(changes) > 1:
        raise ValueError("choose_mode changes its mind more than once as the link gets faster; it must not")
    return ax


def _range(speeds: Speeds) -> tuple[float, float]:
    """Links from slow to fast, in bytes per second, with all that is marked inside."""
    marked = [link * _GBIT for link in _LINKS] + [speeds.link_bytes_per_second, break_even_bytes_per_second(speeds)]
    return min(marked) / 4, max(marked) * 4


def _gbit_text(gbit: float) -> str:
    return f"{gbit:.3g} Gbit/s"


def break_even_text(speeds: Speeds) -> str:
    """Where the two ways meet, and what each usual link would choose."""
    from dataclasses import replace

    even = break_even_bytes_per_second(speeds)
    chosen = ", ".join(f"{gbit} Gbit/s {choose_mode(_TOKENS, replace(speeds, link_bytes_per_second=gbit * _GBIT))}" for gbit in _LINKS)
    return (
        f"{speeds.recompute_tokens_per_second:,.0f} tokens/s of recomputing times {nbytes_text(speeds.kv_nbytes_per_token)} a token are {rate_text(even)}, or "
        f"{_gbit_text(even / _GBIT)}: a link faster than that copies sooner. choose_mode: {chosen}; "
        f"this link, {_gbit_text(speeds.link_bytes_per_second / _GBIT)}, {choose_mode(_TOKENS, speeds)}."
    )


def described_break_even(document: Mapping[str, Any]) -> Described:
    """The break-even of a measured document."""
    speeds, _ = break_even(document)
    return draw_break_even(speeds.link_bytes_per_second / _GBIT, speeds.recompute_tokens_per_second, speeds.kv_nbytes_per_token / 1e3)


def recompute_speeds_table(shapes: Mapping[str, Mapping[str, Any]]) -> Table:
    """For configurations of published models, in 2-byte types: KV bytes a token, and for each usual link the recompute speed above
    which sending tokens is the faster way. Arithmetic, nothing measured."""
    rows = []
    for name, config in shapes.items():
        heads = config.get("num_key_value_heads") or config["num_attention_heads"]
        size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        nbytes = 2 * 2 * config["num_hidden_layers"] * heads * size
        rows.append((name, nbytes_text(nbytes), *(f"{gbit * _GBIT / nbytes:,.0f} tokens/s" for gbit in _LINKS)))
    headers = ("model", "KV a token", *(f"at {gbit} Gbit/s" for gbit in _LINKS))
    return Table(headers, tuple(rows), caption="Recompute, if the destination is faster than this", numeric=frozenset(range(1, 2 + len(_LINKS))))


def draw_break_even(link_gbit: float, recompute: float, kv_kilobytes: float) -> Described:
    """The same for any figures, in the units of the sliders (Gbit/s, tokens/s, kB a token); the drawing function of the widget."""
    speeds = Speeds(recompute, link_gbit * _GBIT, max(1, round(kv_kilobytes * 1e3)))
    said = break_even_text(speeds)
    return describe(plot_break_even(speeds), f"Seconds for {_TOKENS} tokens against the speed of the link, copied and recomputed. {said}", caption=said)
