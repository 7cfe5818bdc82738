"""Where each format puts the layers of a model: a map of the files, and how much of each must arrive before layers run.

Drawing and arithmetic on `Format`s; reads no file. Layers keep the names and the order of `execution_order`. Shown in
chapter 01.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from sllm_mini.lab.formats.files import OURS, SAFETENSORS, TORCH, Format
from sllm_mini.lab.style import INK, PAPER, color_of, darker, ink_on, use_style
from sllm_mini.lab.table import Table
from sllm_mini.lab.units import nbytes_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from sllm_mini.lab.figure import Described

FORMAT_STYLE: Mapping[str, tuple[str, str]] = {TORCH: ("process", "--"), SAFETENSORS: ("remote", "-"), OURS: ("dram", "-")}
"""The colour role and line of each format, the same on every figure."""
_WHOLE = 1 - 1e-9


def layer_label(name: str) -> str:
    """"12" for a numbered layer, its name for the others."""
    return name.rsplit(".", 1)[-1]


def layer_order(fmt: Format) -> list[int]:
    """Layers in the order in which their first bytes lie in the file."""
    return list(dict.fromkeys(tensor.layer for tensor in fmt.stored))


def order_text(fmt: Format) -> str:
    """The order of layers in words: "execution order", or where it first departs from it."""
    order = layer_order(fmt)
    if order == sorted(order):
        return "execution order"
    first = next(at for at, layer in enumerate(order) if layer != at)
    labels = [layer_label(fmt.layers[layer]) for layer in order]
    return f"layer {labels[first]} follows {'the ' if not labels[first - 1].isdigit() else 'layer '}{labels[first - 1]}" if first else f"{labels[0]} comes first"


def formats_table(formats: Mapping[str, Format]) -> Table:
    """What stands in each file besides tensors, and how the tensors lie."""
    return Table(
        headers=("format", "bytes in all", "that are no tensor's", "of these between tensors", "every tensor starts at a multiple of", "layers lie in"),
        rows=tuple(
            (
                fmt.name,
                f"{fmt.file_nbytes:,}",
                f"{fmt.file_nbytes - fmt.tensor_nbytes:,}",
                f"{fmt.between_nbytes:,}",
                f"{fmt.alignment:,}",
                order_text(fmt) if order_text(fmt) == "execution order" else f"another order: {order_text(fmt)}",
            )
            for fmt in formats.values()
        ),
        caption="The same tensors in three formats",
        numeric=frozenset({1, 2, 3, 4}),
    )


def plot_file_map(formats: Mapping[str, Format], ax: Axes | None = None) -> Axes:
    """One strip per format from the first byte of the file to the last, layers numbered and shaded by depth."""
    import matplotlib
    from matplotlib import pyplot
    from matplotlib.colors import to_hex

    if ax is None:
        use_style()
        _, ax = pyplot.subplots(figsize=(7.2, 0.75 + 0.62 * len(formats)), layout="constrained")
    depth = matplotlib.colormaps["viridis"]
    longest = max(fmt.stored[-1].end for fmt in formats.values())
    for row, fmt in enumerate(formats.values()):
        for layer, start, end in _segments(fmt):
            fill = to_hex(depth(layer / max(len(fmt.layers) - 1, 1)))
            ax.barh(row, (end - start) / 1e9, left=start / 1e9, height=0.66, color=fill, edgecolor=PAPER, linewidth=0.6)
            label = layer_label(fmt.layers[layer])
            if end - start > 0.0115 * len(label) * longest:
                ax.text((start + end) / 2e9, row, label, ha="center", va="center", fontsize=7.5, color=ink_on(fill))
    ax.set_yticks(range(len(formats)), [fmt.name for fmt in formats.values()])
    ax.invert_yaxis()
    ax.set_xlim(0, longest / 1e9)
    ax.set_xlabel("place in the file (GB)")
    ax.grid(False)
    ax.spines["left"].set_visible(False)
    ax.tick_params(axis="y", length=0)
    return ax


def file_map_text(formats: Mapping[str, Format]) -> str:
    """What `plot_file_map` shows, as a finding."""
    parts = [f"in {fmt.name} layers lie in {order_text(fmt)}" if order_text(fmt) == "execution order" else f"in {fmt.name} {order_text(fmt)}" for fmt in formats.values()]
    return f"Map of the files of one model, layer by layer: {'; '.join(parts)}."


def plot_prefix(formats: Mapping[str, Format], ax: Axes | None = None) -> Axes:
    """Steps: how many layers can run once the first so many bytes of each file are there."""
    from matplotlib import pyplot

    if ax is None:
        use_style()
        _, ax = pyplot.subplots(figsize=(7.2, 3.3), layout="constrained")
    count = max(len(fmt.layers) for fmt in formats.values())
    longest = max(fmt.stored[-1].end for fmt in formats.values()) / 1e9
    for fmt in sorted(formats.values(), key=lambda fmt: FORMAT_STYLE[fmt.name][1] == "--"):  # dashed ones on top
        role, line = FORMAT_STYLE[fmt.name]
        needed = [nbytes / 1e9 for nbytes in fmt.needed_nbytes()]
        dashed = line == "--"
        ax.step([0.0, *needed, longest], [0, *range(1, len(needed) + 1), len(needed)], where="post", color=color_of(role),
                linestyle=line, linewidth=1.3 if dashed else 3.4, label=fmt.name)  # fmt: skip
    order = {name: at for at, name in enumerate(formats)}
    handles, labels = ax.get_legend_handles_labels()
    pairs = sorted(zip(handles, labels, strict=True), key=lambda pair: order[pair[1]])
    ax.legend([handle for handle, _ in pairs], [label for _, label in pairs], loc="upper left")
    ax.set_xlim(0, longest * 1.01)
    ax.set_ylim(0, count + 1)
    ax.set_xlabel("bytes that have arrived, from the start of the file (GB)")
    ax.set_ylabel("layers that can run")
    return ax


def prefix_text(formats: Mapping[str, Format], share: float = 0.5) -> str:
    """How many layers can run once `share` of each file is there: the finding of `plot_prefix`."""
    parts = [f"{fmt.name} {fmt.runnable_layers(share * fmt.stored[-1].end)} of {len(fmt.layers)}" for fmt in formats.values()]
    curves = {fmt.name: [fmt.runnable_layers(step / 200 * fmt.stored[-1].end) for step in range(201)] for fmt in formats.values()}
    names = list(curves)
    same = [f"{one} and {other}" for at, one in enumerate(names) for other in names[at + 1 :] if curves[one] == curves[other]]
    together = f" The lines of {'; '.join(same)} lie on each other." if same else ""
    return f"With the first {share:.0%} of the file there, layers that can run: {', '.join(parts)}.{together}"


def draw_arrival(formats: Mapping[str, Format], arrived_gb: float) -> Described:
    """Every layer of every format as a lamp, after the first `arrived_gb` of the file; the widget's drawing function."""
    from matplotlib import pyplot
    from matplotlib.patches import Patch, Rectangle

    from sllm_mini.lab.figure import describe

    use_style()
    fig, ax = pyplot.subplots(figsize=(7.2, 0.95 + 0.6 * len(formats)), layout="constrained")
    counts = {}
    for row, fmt in enumerate(formats.values()):
        lit = fmt.runnable_layers(arrived_gb * 1e9)
        shares = fmt.arrived_shares(arrived_gb * 1e9)
        counts[fmt.name] = (lit, sum(share >= _WHOLE for share in shares[lit:]), len(shares))
        for layer, share in enumerate(shares):
            on, whole = layer < lit, share >= _WHOLE
            fill = color_of("ready") if on else color_of("disk") if whole else color_of("wait")
            if share > 0:
                ax.add_patch(Rectangle((layer + 0.06, row - 0.33), 0.88 * share, 0.66, facecolor=fill, edgecolor=fill if on or not whole else darker(fill),
                                       hatch="////" if whole and not on else None, linewidth=0))  # fmt: skip
            ax.add_patch(Rectangle((layer + 0.06, row - 0.33), 0.88, 0.66, fill=False, edgecolor=darker(fill) if whole else color_of("wait"),
                                   linewidth=1.6 if on else 0.9))  # fmt: skip
        ax.text(len(shares) + 0.2, row, f"{lit} can run", va="center", fontsize=9, fontweight="bold", color=INK)
    first = next(iter(formats.values()))
    ticks = [at for at, name in enumerate(first.layers) if not layer_label(name).isdigit() or int(layer_label(name)) % 4 == 0]
    ax.set_xticks([at + (0.9 if at == 0 else 0.5) for at in ticks], [layer_label(first.layers[at]) for at in ticks], fontsize=8.5)
    for tick, at in zip(ax.get_xticklabels(), ticks, strict=True):
        if at == 0:
            tick.set_horizontalalignment("right")
    ax.set_yticks(range(len(formats)), list(formats))
    ax.set_xlim(0, len(first.layers) + 3.6)
    ax.set_ylim(len(formats) - 0.45, -0.55)
    ax.set_title(f"After the first {nbytes_text(arrived_gb * 1e9)} of each file")
    ax.grid(False)
    ax.tick_params(length=0)
    for side in ("left", "bottom"):
        ax.spines[side].set_visible(False)
    ready, waits = color_of("ready"), color_of("disk")
    keys = [Patch(facecolor=ready, edgecolor=darker(ready), label="can run"),
            Patch(facecolor=waits, edgecolor=darker(waits), hatch="////", label="whole, but an earlier layer is missing"),
            Patch(facecolor=color_of("wait"), label="arrived in part")]  # fmt: skip
    fig.legend(handles=keys, loc="outside lower left", ncols=3)
    words = "; ".join(f"{name}: {lit} of {total} layers can run and {waiting} more are whole but wait for an earlier one" for name, (lit, waiting, total) in counts.items())
    return describe(fig, f"After the first {nbytes_text(arrived_gb * 1e9)} of each file. {words}.")


def _segments(fmt: Format) -> list[tuple[int, int, int]]:
    """Runs of neighbouring tensors of one layer: `(layer, start, end)`."""
    found: list[tuple[int, int, int]] = []
    for tensor in fmt.stored:
        if found and found[-1][0] == tensor.layer:
            found[-1] = (tensor.layer, found[-1][1], tensor.end)
        else:
            found.append((tensor.layer, tensor.offset, tensor.end))
    return found
