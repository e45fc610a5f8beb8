"""Sliders over a figure, and a question with answers to choose from."""

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


class _Quiz(ipywidgets.VBox):
    """A box that has a text for where no widget can be shown, as in a notebook read on GitHub."""

    text = ""

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        # As ipywidgets 8 makes it. ipywidgets 7 has no such method, and shows the box in another way, without the text.
        view = {"version_major": 2, "version_minor": 0, "model_id": self.model_id}
        return {"text/plain": self.text, "application/vnd.jupyter.widget-view+json": view}


def quiz(question: str, answers: Mapping[str, str], right: int) -> ipywidgets.VBox:
    """Return a question with radio buttons, and below them what the answers say about the one that is chosen.

    Nothing is chosen at first. On the keyboard, Tab moves between the buttons and Space chooses. Where widgets
    are not shown, as on GitHub, the question and its answers are there as text.

    Args:
        question: shown above the buttons.
        answers: each answer with its feedback: what speaks for it or against it.
        right: the position of the right one.
    """
    if len(answers) < 2 or not 0 <= right < len(answers):
        raise ValueError(f"right={right} with {len(answers)} answers: give two or more, and the right one's position")
    correct = list(answers)[right]
    layout = ipywidgets.Layout(width="auto")
    buttons = ipywidgets.RadioButtons(options=list(answers), value=None, layout=layout)
    feedback = ipywidgets.HTML()

    def judge(change: Mapping[str, Any]) -> None:
        chosen = change["new"]
        if chosen is None:
            feedback.value = ""
            return
        verdict = "Right." if chosen == correct else "Not this one."
        feedback.value = f"<b>{verdict}</b> {html.escape(answers[chosen])}"

    buttons.observe(judge, names="value")
    box = _Quiz([ipywidgets.HTML(f"<b>{html.escape(question)}</b>"), buttons, feedback])
    box.text = "\n".join([question, *(f"( ) {answer}" for answer in answers)])
    return box
