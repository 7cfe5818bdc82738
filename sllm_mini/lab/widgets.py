"""A widget and its static twin, drawn by one function.

`explore(draw, …)` shows what `draw` makes of the controls' first values as ordinary notebook output, so a page read with
no kernel says everything. Where a kernel and a front end are there, sliders appear under it and redraw that same
output: there is one picture, never two, and what is saved is what was last looked at. Used from chapter 00 on.
"""

from __future__ import annotations

import html
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

SWITCH = "SLLM_MINI_WIDGETS"
"""Set to 0 for static pages only (as when a book is built), to 1 for sliders wherever there is a kernel."""

_FRONT_ENDS = ("JPY_SESSION_NAME", "VSCODE_PID", "COLAB_RELEASE_TAG")
"""Set in a kernel's environment by Jupyter's server, VS Code and Colab; not by programs that execute notebooks."""


@dataclass(frozen=True, slots=True)
class Slider:
    """A number between `low` and `high`; on a logarithmic scale with `log`. Raises ValueError for a bad range."""

    description: str
    value: float
    low: float
    high: float
    step: float = 0.1
    unit: str = ""
    log: bool = False

    def __post_init__(self) -> None:
        if not self.low <= self.value <= self.high or not self.low < self.high:
            raise ValueError(f"slider {self.description!r} starts at {self.value}, outside its range {self.low} to {self.high}")
        if self.step <= 0 or (self.log and self.low <= 0):
            raise ValueError(f"slider {self.description!r} needs a step above 0, and a low end above 0 on a logarithmic scale")

    def text(self, value: Any) -> str:
        return f"{value:,.3g}{' ' if self.unit else ''}{self.unit}"

    @property
    def range_text(self) -> str:
        return f"{self.text(self.low)} to {self.text(self.high)}"

    def widget(self, layout: Mapping[str, Any]) -> Any:
        import math

        import ipywidgets

        label = f"{self.description} ({self.unit})" if self.unit else self.description
        # Redrawing takes longer than a mouse moves: redraw when the knob is let go.
        common = {"value": self.value, "description": label, "continuous_update": False, **layout}
        if self.log:
            return ipywidgets.FloatLogSlider(min=math.log10(self.low), max=math.log10(self.high), step=0.01, readout_format=".3g", **common)
        return ipywidgets.FloatSlider(min=self.low, max=self.high, step=self.step, readout_format=".3g", **common)


@dataclass(frozen=True, slots=True)
class Choice:
    """One of several named values; `options` maps what is shown to what `draw` gets."""

    description: str
    value: Any
    options: Mapping[str, Any]

    def __post_init__(self) -> None:
        if self.value not in self.options.values():
            raise ValueError(f"choice {self.description!r} starts at {self.value!r}, which is none of its options {', '.join(self.options)}")
        object.__setattr__(self, "options", MappingProxyType(dict(self.options)))

    def text(self, value: Any) -> str:
        return next(name for name, option in self.options.items() if option == value)

    @property
    def range_text(self) -> str:
        return ", ".join(self.options)

    def widget(self, layout: Mapping[str, Any]) -> Any:
        import ipywidgets

        # By their names alone: a value of None would be no selection, and the list empty at first.
        return ipywidgets.Dropdown(options=list(self.options), value=self.text(self.value), description=self.description, **layout)


@dataclass(frozen=True, slots=True)
class Toggle:
    """On or off."""

    description: str
    value: bool = False

    def text(self, value: Any) -> str:
        return "yes" if value else "no"

    @property
    def range_text(self) -> str:
        return "yes or no"

    def widget(self, layout: Mapping[str, Any]) -> Any:
        import ipywidgets

        return ipywidgets.Checkbox(value=self.value, description=self.description, indent=True, **layout)


Control = Slider | Choice | Toggle


def has_front_end() -> bool:
    """True where this process is a kernel that somebody looks at, so that a slider can move."""
    import sys

    ipython = sys.modules.get("IPython")  # a kernel has imported it
    shell = ipython.get_ipython() if ipython is not None else None
    if shell is None or not hasattr(shell, "kernel") or os.environ.get(SWITCH) == "0":
        return False
    return os.environ.get(SWITCH) == "1" or any(name in os.environ for name in _FRONT_ENDS)


class Explorer:
    """What `explore` returns; showing it as the last line of a cell displays it. One thread at a time."""

    def __init__(self, draw: Callable[..., Any], controls: Mapping[str, Control]) -> None:
        self.draw = draw
        self.controls = dict(controls)
        self.values: dict[str, Any] = {name: control.value for name, control in controls.items()}

    def render(self) -> dict[str, str]:
        """What `draw` makes of the present values, as HTML and as text, with the values listed below it."""
        bundle = _bundle(self.draw(**self.values))
        settings = [
            f"{control.description}: {control.text(self.values[name])} ({control.range_text})" for name, control in self.controls.items()
        ]
        items = "".join(f"<li>{html.escape(line)}</li>" for line in settings)
        where = "in a running notebook these are controls"
        return {
            "text/html": f"{bundle['text/html']}<details><summary>Drawn with ({where})</summary><ul>{items}</ul></details>",
            "text/plain": f"{bundle['text/plain']}\nDrawn with ({where}):\n" + "\n".join(f"  {line}" for line in settings),
        }

    def panel(self, redraw: Callable[[dict[str, str]], None]) -> Any:
        """The controls as an ipywidgets box; each change calls `redraw` with the new rendering."""
        import ipywidgets

        layout = {"layout": ipywidgets.Layout(width="min(36em, 100%)"), "style": {"description_width": "16em"}}
        widgets = []
        for name, control in self.controls.items():
            widget = control.widget(layout)

            def on_change(change: Mapping[str, Any], name: str = name, control: Control = control) -> None:
                self.values[name] = control.options[change["new"]] if isinstance(control, Choice) else change["new"]
                redraw(self.render())

            widget.observe(on_change, names="value")
            widgets.append(widget)
        return ipywidgets.VBox(widgets)

    def _ipython_display_(self) -> None:
        from IPython.display import display

        handle = display(self.render(), raw=True, display_id=True)
        if has_front_end() and handle is not None:
            display(self.panel(lambda bundle: handle.update(bundle, raw=True)))

    def __repr__(self) -> str:
        return self.render()["text/plain"]


def _bundle(drawn: Any) -> dict[str, str]:
    """HTML and text of one drawn thing, or of several one below the other."""
    parts = drawn if isinstance(drawn, tuple | list) else (drawn,)
    bundles = [part._repr_mimebundle_() for part in parts]
    return {kind: "\n".join(bundle[kind] for bundle in bundles) for kind in ("text/html", "text/plain")}


def explore(draw: Callable[..., Any], **controls: Control) -> Explorer:
    """Shows `draw(**values)` with a control for each of its arguments.

    `draw` returns a `Described` figure, a `Table`, or a tuple of them. Raises ValueError where there is no control,
    TypeError where one is not a `Slider`, `Choice` or `Toggle`.
    """
    if not controls:
        raise ValueError("there is nothing to explore without controls; give at least one Slider, Choice or Toggle")
    for name, control in controls.items():
        if not isinstance(control, Control):
            raise TypeError(f"control {name} is a {type(control).__name__}; give a Slider, a Choice or a Toggle")
    return Explorer(draw, controls)
