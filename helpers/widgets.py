"""Sliders over a figure."""

from __future__ import annotations

import html
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ipywidgets
from matplotlib.figure import Figure


def explore(
    draw: Callable[..., str],
    values: Mapping[str, Sequence[Any]],
    start: Mapping[str, Any],
    labels: Mapping[str, str] | None = None,
    figsize: tuple[float, float] = (6.0, 3.0),
) -> ipywidgets.VBox:
    """Return a slider for each parameter of `draw`, above the figure that it draws and the sentence that it returns.

    The figure is redrawn when a slider is let go. It goes into an image widget and is made without pyplot, so that
    moving a slider adds nothing to the cell's output.

    Args:
        draw: called as `draw(ax=ax, **chosen)` with fresh Axes; returns one sentence that says what the figure shows.
        values: for each parameter, the values its slider steps through, numbers or words.
        start: for each parameter, the value to start with; one of `values`.
        labels: what to write beside a slider; the parameter's name by default.
    """
    if start.keys() != values.keys():
        raise ValueError(f"start names {', '.join(start)}, and values {', '.join(values)}: name the same parameters")
    for name, value in start.items():
        if value not in values[name]:
            raise ValueError(f"start: {name}={value} is not one of its values, {', '.join(map(str, values[name]))}")
    sliders = {
        name: ipywidgets.SelectionSlider(
            options=list(options),
            value=start[name],
            description=(labels or {}).get(name, name),
            continuous_update=False,
            style={"description_width": "80px"},
        )
        for name, options in values.items()
    }
    image = ipywidgets.Image(format="png", layout=ipywidgets.Layout(width=f"{100 * figsize[0]:.0f}px"))
    sentence = ipywidgets.HTML()

    def redraw(change: object = None) -> None:
        figure = Figure(figsize=figsize, layout="constrained")
        text = draw(ax=figure.subplots(), **{name: slider.value for name, slider in sliders.items()})
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=150)
        image.value = png.getvalue()
        sentence.value = html.escape(text)

    for slider in sliders.values():
        slider.observe(redraw, names="value")
    redraw()
    return ipywidgets.VBox([*sliders.values(), image, sentence])
